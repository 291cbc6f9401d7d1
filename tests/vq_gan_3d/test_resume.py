"""T09–T12: train N = train k, kill, resume to N: equal to the bit, codebook, discriminators, EMA and optimizers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import BASELINE, STATE_KEYS, assert_one_line_error, assert_same_state, kill, start, wait_for
from tests.vq_gan_3d.conftest import Train
from vq_gan_3d.checkpointing import load_checkpoint


def assert_same_run(a: Path, b: Path) -> None:
    first, second = (load_checkpoint(path) for path in (a, b))
    for key in STATE_KEYS:
        assert_same_state(first[key], second[key], key)
    assert int(first["current_model_state"]["steps"]) == int(second["current_model_state"]["steps"])


@pytest.mark.parametrize(
    ("quantizer", "first_part"),  # in the middle, and at the end, of an epoch of 5 batches
    [
        ("ema", 3),
        pytest.param("fsq", 3, marks=pytest.mark.slow),
        pytest.param("fsq", 5, marks=pytest.mark.slow),
        pytest.param("ema", 5, marks=pytest.mark.slow),
        pytest.param("simvq", 5, marks=pytest.mark.slow),
    ],
)
def test_t09_two_parts_equal_one_run(tmp_path: Path, train: Train, quantizer: str, first_part: int) -> None:
    options = [f"model.quantizer={quantizer}", "training.checkpoint_every_n_steps=1"]
    train(*options, "training.max_steps=8", "output_dir=whole")
    train(*options, f"training.max_steps={first_part}", "output_dir=parts")
    train(*options, "training.max_steps=8", "output_dir=parts", "ckpt_path=last")
    assert_same_run(tmp_path / "whole/checkpoints/final.ckpt", tmp_path / "parts/checkpoints/final.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "kills"),  # in one epoch of ten batches and the next
    [(0, (3, 15)), (1, (7, 11)), (2, (3, 5, 7, 11, 15))],
)
def test_t10_t12_killed_runs_equal_one_run(tmp_path: Path, train: Train, workers: int, kills: tuple[int, ...]) -> None:
    options = [
        f"training.num_workers={workers}",
        "training.checkpoint_every_n_steps=1",
        "training.max_steps=16",
        "dataset.patches_per_volume=2",
        "dataset.patch_size=[16,16,16]",
        "training.accumulate_grad_batches=2",
    ]
    train(*options, "output_dir=whole")
    for step in kills:
        resume = ["ckpt_path=last"] if (tmp_path / "parts").exists() else []
        process = start(BASELINE, *options, "output_dir=parts", *resume, cwd=tmp_path)
        saved = 2 * (step // 2)
        epoch = saved // 10
        wait_for(tmp_path / f"parts/checkpoints/epoch_{epoch:02d}_step_{saved:04d}.ckpt", process)
        kill(process)
    train(*options, "output_dir=parts", "ckpt_path=last")
    assert_same_run(tmp_path / "whole/checkpoints/final.ckpt", tmp_path / "parts/checkpoints/final.ckpt")


@pytest.mark.slow
def test_t09_the_best_checkpoint_resumes_exactly(tmp_path: Path, train: Train) -> None:
    options = ["training.max_steps=10"]
    train(*options, "output_dir=whole")
    train("training.max_steps=5", "output_dir=parts")
    best = tmp_path / "parts/checkpoints/best.ckpt"
    assert int(load_checkpoint(best)["current_model_state"]["steps"]) == 5
    train(*options, "output_dir=rest", f"ckpt_path={best}")
    assert_same_run(tmp_path / "whole/checkpoints/final.ckpt", tmp_path / "rest/checkpoints/final.ckpt")


@pytest.mark.slow
def test_t14_other_settings_are_refused_by_name(tmp_path: Path, train: Train) -> None:
    train("training.max_steps=1")
    for override, key in (
        ("training.seed=1", "training.seed (0 there, 1 here)"),
        ("training.batch_size=2", "training.batch_size"),
        ("dataset.n_patients=7", "dataset (volumes)"),
        ("model.quantizer=ema", "model.quantizer (fsq there, ema here)"),
    ):
        assert_one_line_error(train("training.max_steps=2", override, "ckpt_path=last", check=2), key)


def test_an_old_run_is_not_overwritten(tmp_path: Path, train: Train) -> None:
    train("training.max_steps=1")
    before = (tmp_path / "outputs/checkpoints/final.ckpt").read_bytes()
    result = train("training.max_steps=2", check=2)
    assert "ckpt_path=last" in result.stderr
    assert (tmp_path / "outputs/checkpoints/final.ckpt").read_bytes() == before
    train("training.max_steps=2", "overwrite=true")
