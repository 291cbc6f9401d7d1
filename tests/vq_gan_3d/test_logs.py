"""The tables of a run that was killed and resumed hold every step once."""

from __future__ import annotations

import csv
from pathlib import Path


def test_a_resumed_run_drops_rows_beyond_its_checkpoint(tmp_path: Path, train) -> None:
    options = ("training.checkpoint_every_n_steps=2", "logger.every_n_steps=1")
    train("training.max_steps=4", *options)
    checkpoints, logs = tmp_path / "outputs/checkpoints", tmp_path / "outputs/logs"
    for path in checkpoints.iterdir():  # as if the run had been killed before it saved again
        if path.name != "epoch_00_step_0002.ckpt":
            path.unlink()
    with (logs / "train.csv").open("a") as file:
        file.write("5,0")  # a row that the kill cut short
    first = (logs / "train.csv").read_text().splitlines()
    train("training.max_steps=6", *options, "ckpt_path=last")

    def steps(table: str) -> list[int]:
        with (logs / table).open(newline="") as file:
            return [int(row["step"]) for row in csv.DictReader(file)]

    assert steps("train.csv") == [1, 2, 3, 4, 5, 6]
    assert steps("validation.csv") == [5, 6]
    assert (logs / "train.csv").read_text().splitlines()[:3] == first[:3]
