"""T09–T12: train N = train k, kill, resume to N: equal to the bit, codebook, discriminators, EMA and optimizers."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from dataset.volume_io import Volume, write_nifti
from tests.helpers import BASELINE, STATE_KEYS, assert_one_line_error, assert_same_state, kill, start, wait_for
from tests.vq_gan_3d.conftest import Train
from tests.vq_gan_3d.test_lpips import random_weights
from vq_gan_3d.checkpointing import load_checkpoint
from vq_gan_3d.resume import FREE_MODEL_SETTINGS
from vq_gan_3d.vqgan import VQGAN, LossConfig


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
@pytest.mark.parametrize("where", ["best", "signal"])
def test_an_epoch_that_ends_within_a_window_resumes_exactly(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Five batches and windows of two: the fifth has no step, so it is left out, and nothing of it is lost."""
    options = ["training.accumulate_grad_batches=2", "model.discriminator_iter_start=999"]
    train(*options, "training.max_steps=12", "output_dir=whole")
    if where == "best":
        train(*options, "training.num_epochs=1", "output_dir=parts")
        start = tmp_path / "parts/checkpoints/best.ckpt"
    else:
        with monkeypatch.context() as patch:
            patch.setattr(
                VQGAN, "on_validation_epoch_start", lambda self: os.kill(os.getpid(), signal.SIGTERM), raising=True
            )
            train(*options, "training.max_steps=12", "output_dir=parts", check=143)
        start = tmp_path / "parts/checkpoints/last.ckpt"
    assert int(load_checkpoint(start)["current_model_state"]["steps"]) == 4
    train(*options, "training.max_steps=12", "output_dir=rest", f"ckpt_path={start}")
    assert_same_run(tmp_path / "whole/checkpoints/final.ckpt", tmp_path / "rest/checkpoints/final.ckpt")
    refused = train("training.accumulate_grad_batches=6", "output_dir=no", check=2)
    assert_one_line_error(refused, "training.accumulate_grad_batches=6", "only 5 batches")


def phantoms_of_the_same_names(folder: Path) -> Path:
    """Files that are called as the phantoms are, and hold something else."""
    other = folder / "ct"
    other.mkdir()
    for number in range(6):
        hu = np.full((16, 32, 32), number, np.int16)
        write_nifti(other / f"phantom_{number:05d}.nii.gz", Volume(hu, np.diag([2.0, 2.0, 2.0, 1.0])))
    return other


def test_what_is_minimised_may_change_and_is_named(tmp_path: Path, train: Train) -> None:
    weights = random_weights(tmp_path / "lpips.pt")
    moved = tmp_path / "moved.pt"
    lpips = ["model.lpips_weight=0.1", f"model.lpips_weights={weights}"]
    train("training.max_steps=1", *lpips)
    weights.rename(moved)
    changed = ["model.adversarial_weight=0.2", "model.discriminator_iter_start=1"]
    lpips[1] = f"model.lpips_weights={moved}"
    result = train("training.max_steps=2", *lpips, *changed, "ckpt_path=last")
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("changed from here on: "))
    for words in ("adversarial_weight (0.1 there, 0.2 here)", "discriminator_iter_start (2 there, 1 here)", str(moved)):
        assert words in line
    assert "lpips_weight (" not in line
    refused = train("training.max_steps=3", *lpips, "model.discriminator_width=8", "ckpt_path=last", check=2)
    assert_one_line_error(refused, "model.discriminator_width (4 there, 8 here)")
    fields = {field.name for field in dataclasses.fields(LossConfig)}
    shapes = {"discriminator_2d", "discriminator_3d", "discriminator_width", "discriminator_layers"}
    assert fields - shapes == FREE_MODEL_SETTINGS


@pytest.mark.slow
def test_t14_other_settings_are_refused_by_name(tmp_path: Path, train: Train) -> None:
    train("training.max_steps=1")
    other = phantoms_of_the_same_names(tmp_path)
    for override, key in (
        ("dataset.validation=[phantom_00001]", "dataset (volumes)"),  # held out there, trained on here
        ("dataset.validation_fraction=0.6", "dataset (volumes)"),
        (f"dataset.root_dir={other}", "dataset (volumes)"),
        ("training.seed=1", "training.seed (0 there, 1 here)"),
        ("training.batch_size=2", "training.batch_size"),
        ("dataset.n_patients=7", "dataset (volumes)"),
        ("model.quantizer=ema", "model.quantizer (fsq there, ema here)"),
    ):
        assert_one_line_error(train("training.max_steps=2", override, "ckpt_path=last", check=2), key)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.ckpt")}


def test_last_goes_on_from_the_branch_of_a_rewind(tmp_path: Path, train: Train) -> None:
    """Back from step 8 to 6 with another learning rate, stopped at 7: ``last`` is step 7, and the old 8 is kept."""
    options = ["training.checkpoint_every_n_steps=1", "training.warmup_steps=0"]
    train(*options, "training.max_steps=8")
    checkpoints = tmp_path / "outputs/checkpoints"
    before = contents(checkpoints)
    named = checkpoints / "epoch_01_step_0006.ckpt"
    changed = [*options, "training.learning_rate=0.01"]
    train(*changed, "training.max_steps=8", f"ckpt_path={named}", "training.seed=1", check=2)
    assert contents(checkpoints) == before  # refused: nothing was left yet
    result = train(*changed, "training.max_steps=7", f"ckpt_path={named}")
    aside = checkpoints / "abandoned_from_step_0006"
    later = {"epoch_01_step_0007.ckpt", "epoch_01_step_0008.ckpt", "best.ckpt", "final.ckpt", "last.ckpt"}
    assert contents(aside) == {name: before[name] for name in later}
    assert "5 checkpoint(s) that it leaves moved to outputs/checkpoints/abandoned_from_step_0006" in result.stderr
    assert (checkpoints / "best.ckpt").exists()  # of the new branch, however good the old one was
    result = train(*changed, "training.max_steps=8", "ckpt_path=last")
    assert "at step 7" in result.stderr
    assert contents(aside) == {name: before[name] for name in later}
    train(*changed, "training.max_steps=8", f"ckpt_path={aside.parent / named.name}", "output_dir=straight")
    assert_same_run(checkpoints / "final.ckpt", tmp_path / "straight/checkpoints/final.ckpt")
    # back to the old branch: all that is not of it goes aside, and twice from a step takes a second folder
    train(*options, "training.max_steps=9", f"ckpt_path={aside / 'final.ckpt'}")
    assert "final.ckpt" in contents(checkpoints / "abandoned_from_step_0008")
    train(*options, "training.max_steps=8", f"ckpt_path={aside / 'final.ckpt'}")
    assert "final.ckpt" in contents(checkpoints / "abandoned_from_step_0008_2")
    train(*options, "training.max_steps=1", "overwrite=true")
    assert not list(checkpoints.glob("abandoned*"))


def test_an_old_run_is_not_overwritten(tmp_path: Path, train: Train) -> None:
    train("training.max_steps=1")
    before = (tmp_path / "outputs/checkpoints/final.ckpt").read_bytes()
    result = train("training.max_steps=2", check=2)
    assert "ckpt_path=last" in result.stderr
    assert (tmp_path / "outputs/checkpoints/final.ckpt").read_bytes() == before
    train("training.max_steps=2", "overwrite=true")
