"""T01–T02: kill -9 at any moment, while a checkpoint is overwritten above all: the newest valid one loads."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.helpers import BASELINE, ROOT, environment, kill, run, start, wait_for
from vq_gan_3d.checkpointing import find_resumable, load_checkpoint

# Saves step after step into one file, as `last.ckpt` is, and reports each save once it has returned.
SAVER = """
import sys, torch
from vq_gan_3d.checkpointing import load_checkpoint, save_checkpoint
path = sys.argv[1]
weights = torch.zeros(500_000)
print("ready", flush=True)
for step in range(10**9):
    save_checkpoint(path, {"step": step, "weights": weights.fill_(step)})
    print(step, flush=True)
"""


def start_saver(path: Path) -> subprocess.Popen[str]:
    # TMPDIR on another file system is what destroyed Lightning's checkpoints
    process = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(path)],
        cwd=ROOT,
        env=environment(TMPDIR="/dev/shm" if Path("/dev/shm").is_dir() else "/tmp"),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def kill_while_saving(path: Path, after_s: float) -> None:
    process = start_saver(path)
    assert process.stdout is not None
    time.sleep(after_s)
    process.kill()
    reported = [int(line) for line in process.stdout.read().split()]
    process.wait()
    found, rejected = find_resumable(path.parent)
    assert (found, rejected) == (path, [])
    checkpoint = load_checkpoint(found)
    # what was reported as saved is there, or what was being saved after it
    assert checkpoint["step"] - max(reported, default=checkpoint["step"]) in (0, 1)
    assert torch.equal(checkpoint["weights"], torch.full((500_000,), float(checkpoint["step"])))
    assert len(list(path.parent.glob(".*.tmp"))) <= 1  # of the last kill; earlier ones were removed


@pytest.mark.slow
def test_t01_t02_thirty_kills_while_one_checkpoint_is_overwritten(tmp_path: Path) -> None:
    rng = random.Random(0)
    path = tmp_path / "last.ckpt"
    from vq_gan_3d.checkpointing import save_checkpoint

    save_checkpoint(path, {"step": 0, "weights": torch.zeros(500_000)})
    for _ in range(30):
        kill_while_saving(path, rng.uniform(0.0, 0.3))


@pytest.mark.slow
def test_t02_kills_of_the_trainer_at_random_times(tmp_path: Path) -> None:
    rng = random.Random(1)
    checkpoints = tmp_path / "outputs/checkpoints"
    reached = 0
    for attempt in range(4):
        options = ["training.checkpoint_every_n_steps=1", "training.max_steps=100000"]
        process = start(BASELINE, *options, *(["ckpt_path=last"] if attempt else []), cwd=tmp_path, TMPDIR="/dev/shm")
        wait_for(checkpoints / f"epoch_{(reached + 1) // 5:02d}_step_{reached + 1:04d}.ckpt", process)
        time.sleep(rng.uniform(0, 1.5))
        kill(process)
        found, _ = find_resumable(checkpoints)
        steps = int(load_checkpoint(found)["current_model_state"]["steps"])
        assert steps > reached
        reached = steps
    run(BASELINE, "training.max_steps=" + str(reached + 1), "ckpt_path=last", cwd=tmp_path)
    final = load_checkpoint(checkpoints / "final.ckpt")
    assert int(final["current_model_state"]["steps"]) == reached + 1
