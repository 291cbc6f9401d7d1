"""T09–T12 for the diffusion model: train N = train k, kill, resume to N, to the bit; other settings are refused."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from tests.ddpm.tiny import TINY_DDPM, ddpm_command, saved_codec
from tests.helpers import STATE_KEYS, assert_one_line_error, assert_same_state, environment, kill, wait_for
from tests.in_process import DDPM, Train
from vq_gan_3d.checkpointing import load_checkpoint


def assert_same_run(a: Path, b: Path) -> None:
    first, second = (load_checkpoint(path) for path in (a, b))
    for key in STATE_KEYS:
        assert_same_state(first[key], second[key], key)


def start(codec: Path, cwd: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ddpm_command(codec, *overrides), cwd=cwd, env=environment(XDG_CACHE_HOME=str(cwd / "cache")),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def run(codec: Path, cwd: Path, *overrides: str, check: int = 0) -> None:
    process = start(codec, cwd, *overrides)
    _, err = process.communicate(timeout=600)
    assert process.returncode == check, err[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("first_part", [3, 5])  # in the middle, and at the end, of an epoch of 5 batches
def test_t09_two_parts_equal_one_run(tmp_path: Path, train: Train, first_part: int):
    options = [*TINY_DDPM, f"pretrained_vqgan={saved_codec(tmp_path)}", "training.checkpoint_every_n_steps=1"]
    train(*options, "training.max_steps=8", "output_dir=whole", script=DDPM, tiny=False)
    train(*options, f"training.max_steps={first_part}", "output_dir=parts", script=DDPM, tiny=False)
    train(*options, "training.max_steps=8", "output_dir=parts", "ckpt_path=last", script=DDPM, tiny=False)
    assert_same_run(tmp_path / "whole/checkpoints/final.ckpt", tmp_path / "parts/checkpoints/final.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "kills"), [(0, (2, 4, 6, 8, 10)), (1, (6,)), (2, (4, 8))])
def test_t10_killed_runs_equal_one_run(tmp_path: Path, train: Train, workers: int, kills: tuple[int, ...]):
    codec = saved_codec(tmp_path)
    options = [
        f"training.num_workers={workers}",
        "training.checkpoint_every_n_steps=1",
        "training.max_steps=14",
        "training.accumulate_grad_batches=2",
        "dataset.patch_size=[8,8,8]",
        "dataset.patches_per_volume=3",
    ]
    here = [*TINY_DDPM, f"pretrained_vqgan={codec}", *options]
    train(*here, "output_dir=whole", script=DDPM, tiny=False)
    for saved in kills:  # all in one epoch of 15 batches
        resume = ["ckpt_path=last"] if (tmp_path / "parts").exists() else []
        process = start(codec, tmp_path, *options, "output_dir=parts", *resume)
        wait_for(tmp_path / f"parts/checkpoints/epoch_00_step_{saved:04d}.ckpt", process, 300)
        kill(process)
    train(*here, "output_dir=parts", "ckpt_path=last", script=DDPM, tiny=False)
    assert_same_run(tmp_path / "whole/checkpoints/final.ckpt", tmp_path / "parts/checkpoints/final.ckpt")


@pytest.mark.slow
def test_t13_sigterm_saves_and_says_how_to_go_on(tmp_path: Path):
    codec = saved_codec(tmp_path)
    process = start(codec, tmp_path, "training.max_steps=100000", "training.checkpoint_every_n_steps=1")
    wait_for(tmp_path / "outputs/checkpoints/epoch_00_step_0002.ckpt", process, 300)
    os.kill(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 143, err[-2000:]
    assert "ckpt_path=last" in err.strip().splitlines()[-1]
    assert load_checkpoint(tmp_path / "outputs/checkpoints/last.ckpt")["kind"] == "ddpm"


@pytest.mark.slow
def test_t14_other_settings_are_refused_by_name(tmp_path: Path, train: Train):
    options = [*TINY_DDPM, "training.max_steps=1"]
    own, other = (f"pretrained_vqgan={saved_codec(tmp_path, seed)}" for seed in (0, 1))
    train(*options, own, script=DDPM, tiny=False)
    for override, key in (
        ("model.diffusion.objective=x0", "model.diffusion.objective (v there, x0 here)"),
        ("training.seed=1", "training.seed (0 there, 1 here)"),
        (other, "pretrained_vqgan (content)"),
    ):
        given = [own] if "vqgan" not in override else []
        result = train(*options, *given, override, "ckpt_path=last", script=DDPM, tiny=False, check=2)
        assert_one_line_error(result, key)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path, train: Train):
    codec = saved_codec(tmp_path)
    cohort = ["dataset.n_patients=8", "dataset.validation=[phantom_00000,phantom_00001]", "training.max_steps=4"]
    here = [*TINY_DDPM, f"pretrained_vqgan={codec}", *cohort]
    train(*here, "training.batch_size=2", "output_dir=one", script=DDPM, tiny=False)
    run(codec, tmp_path, *cohort, "hardware.processes=2", "output_dir=two")
    one, two = (load_checkpoint(tmp_path / f"{name}/checkpoints/final.ckpt") for name in ("one", "two"))
    names = [name for name, value in one["current_model_state"].items() if value.is_floating_point()]
    a, b = (torch.cat([state["current_model_state"][n].flatten().double() for n in names]) for state in (one, two))
    still = ["training.max_steps=1", "training.learning_rate=0.0", "output_dir=start"]
    train(*here, *still, script=DDPM, tiny=False)
    start_state = load_checkpoint(tmp_path / "start/checkpoints/final.ckpt")["current_model_state"]
    moved = (a - torch.cat([start_state[n].flatten().double() for n in names])).norm()
    assert moved > 0
    assert (a - b).norm() < 0.02 * moved
