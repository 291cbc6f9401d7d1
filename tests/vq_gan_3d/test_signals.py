"""T13: SIGTERM and SIGINT end a run at a step boundary, with a checkpoint that continues it exactly."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dataset.intensity import HUWindow
from tests.helpers import BASELINE, STATE_KEYS, assert_one_line_error, assert_same_state, last_line, start, wait_for
from tests.vq_gan_3d.conftest import Train
from vq_gan_3d.checkpointing import load_checkpoint

STEPS = "training.max_steps=7"


def steps_of(path: Path) -> int:
    return int(load_checkpoint(path)["current_model_state"]["steps"])


def assert_same_run(a: Path, b: Path) -> None:
    first, second = load_checkpoint(a), load_checkpoint(b)
    for key in STATE_KEYS:
        assert_same_state(first[key], second[key], key)
    assert steps_of(a) == steps_of(b) == 7


@pytest.fixture
def at_call(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Do something when the window maps its n-th volume of (tensor) data: 1–5 are steps, then validation."""

    def arrange(call: int, action: Callable[[], None]) -> None:
        original, seen = HUWindow.to_unit, []

        def to_unit(self: HUWindow, volume: Any) -> Any:
            if isinstance(volume, torch.Tensor) and volume.ndim == 5:
                seen.append(1)
                if len(seen) == call:
                    action()
            return original(self, volume)

        monkeypatch.setattr(HUWindow, "to_unit", to_unit)

    return arrange


@pytest.mark.parametrize(
    ("number", "code", "name", "call", "saved"),
    [
        pytest.param(signal.SIGTERM, 143, "SIGTERM", 3, 3, id="term in a step"),
        pytest.param(signal.SIGTERM, 143, "SIGTERM", 6, 5, id="term in validation"),
        pytest.param(signal.SIGINT, 130, "SIGINT", 3, 3, id="int in a step", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, "SIGINT", 6, 5, id="int in validation", marks=pytest.mark.slow),
    ],
)
def test_t13_a_signal_saves_and_the_rest_is_exact(
    tmp_path: Path,
    train: Train,
    signal_self: Callable[[int], None],
    at_call: Callable[..., None],
    number: int,
    code: int,
    name: str,
    call: int,
    saved: int,
) -> None:
    at_call(call, lambda: signal_self(number))
    stopped = train(STEPS, "output_dir=parts", check=code)
    assert_one_line_error(stopped, f"stopped by {name}", "parts/checkpoints/epoch_0", "ckpt_path=last")
    assert steps_of(tmp_path / "parts/checkpoints/last.ckpt") == saved
    assert not (tmp_path / "parts/logs/validation.csv").exists()  # a validation that was cut short has no result
    train(STEPS, "output_dir=parts", "ckpt_path=last")
    train(STEPS, "output_dir=whole")
    assert_same_run(tmp_path / "parts/checkpoints/final.ckpt", tmp_path / "whole/checkpoints/final.ckpt")
    # a validation that was cut short is not repeated: its row is missing, the others are the same
    whole, parts = ((tmp_path / part / "logs/validation.csv").read_text().splitlines() for part in ("whole", "parts"))
    assert parts == (whole if saved == 3 else [whole[0], *whole[2:]])


def test_t13_a_second_sigterm_during_the_save_changes_nothing(
    tmp_path: Path, train: Train, signal_self: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, at_call: Any
) -> None:
    fsync, in_save = os.fsync, []

    def fsync_with_signal(descriptor: int) -> None:
        if in_save:
            signal_self(signal.SIGTERM)
        fsync(descriptor)

    def first() -> None:
        in_save.append(1)
        signal_self(signal.SIGTERM)

    monkeypatch.setattr(os, "fsync", fsync_with_signal)
    at_call(2, first)
    assert_one_line_error(train(STEPS, check=143), "stopped by SIGTERM")
    assert steps_of(tmp_path / "outputs/checkpoints/last.ckpt") == 2
    assert not list((tmp_path / "outputs/checkpoints").glob(".*"))


def test_a_signal_in_validation_leaves_the_checkpoint_of_the_epoch_permanent(
    tmp_path: Path, train: Train, signal_self: Callable[[int], None], at_call: Callable[..., None]
) -> None:
    """Saved at the end of its epoch and again at the signal: neither pruned later, nor counted among those that are."""
    every = [
        "training.checkpoint_every_n_epochs=1",
        "training.checkpoint_every_n_steps=1",
        "callbacks.keep_step_checkpoints=2",
    ]
    at_call(6, lambda: signal_self(signal.SIGTERM))
    train(STEPS, *every, check=143)
    train("training.max_steps=9", *every, "ckpt_path=last")
    numbered = sorted(path.name for path in (tmp_path / "outputs/checkpoints").glob("epoch_*.ckpt"))
    assert numbered == [f"epoch_01_step_000{step}.ckpt" for step in (5, 8, 9)]


def test_a_step_saved_twice_counts_once(
    tmp_path: Path, train: Train, signal_self: Callable[[int], None], at_call: Callable[..., None]
) -> None:
    every = ["training.checkpoint_every_n_steps=1", "callbacks.keep_step_checkpoints=2"]
    at_call(6, lambda: signal_self(signal.SIGTERM))
    train(STEPS, *every, check=143)
    numbered = sorted(path.name for path in (tmp_path / "outputs/checkpoints").glob("epoch_*.ckpt"))
    assert numbered == ["epoch_00_step_0004.ckpt", "epoch_01_step_0005.ckpt"]


@pytest.mark.slow
def test_a_second_sigint_ends_at_once(
    tmp_path: Path, train: Train, signal_self: Callable[[int], None], at_call: Any
) -> None:
    def twice() -> None:
        signal_self(signal.SIGINT)
        signal_self(signal.SIGINT)

    at_call(2, twice)
    assert_one_line_error(train(STEPS, check=130), "second SIGINT")
    assert not (tmp_path / "outputs/checkpoints/last.ckpt").exists()


def test_a_signal_during_the_final_save_lets_it_finish(
    tmp_path: Path, train: Train, signal_self: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    import vq_gan_3d.checkpoint_callback as module

    save = module.save_checkpoint

    def save_with_signal(path: Path, content: dict[str, Any]) -> None:
        if path.name == "final.ckpt":
            signal_self(signal.SIGTERM)
        save(path, content)

    monkeypatch.setattr(module, "save_checkpoint", save_with_signal)
    train("training.max_steps=2")
    assert steps_of(tmp_path / "outputs/checkpoints/last.ckpt") == 2


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["term", "int"])
@pytest.mark.parametrize("where", ["prepare_all", "setup"])
def test_a_signal_before_training(
    tmp_path: Path,
    train: Train,
    signal_self: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: int,
    where: str,
) -> None:
    if where == "prepare_all":  # while volumes are prepared, and once Lightning has taken over
        import dataset.data_module as module

        prepare = module.prepare_all
        monkeypatch.setattr(module, "prepare_all", lambda *a: (signal_self(number), prepare(*a))[1])
    else:
        from vq_gan_3d.vqgan import VQGAN

        monkeypatch.setattr(VQGAN, "setup", lambda self, stage: signal_self(number))
    assert_one_line_error(train(STEPS, check=code), "SIGTERM" if code == 143 else "SIGINT")
    assert not list((tmp_path / "outputs/checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["term", "int"])
def test_a_signal_to_the_whole_group_spares_the_workers_until_the_save(tmp_path: Path, number: int, code: int) -> None:
    """What Ctrl-C, `timeout` and SLURM do: the data workers get it too."""
    process = start(BASELINE, "training.num_workers=2", "training.checkpoint_every_n_steps=1", cwd=tmp_path)
    wait_for(tmp_path / "outputs/checkpoints/epoch_00_step_0003.ckpt", process)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    result = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    assert process.returncode == code, err[-3000:]
    assert_one_line_error(result, "saved outputs/checkpoints/")
    saved = Path(last_line(result).split("saved ")[1].split(":")[0])
    assert steps_of(tmp_path / saved) == steps_of(tmp_path / "outputs/checkpoints/last.ckpt") >= 3
