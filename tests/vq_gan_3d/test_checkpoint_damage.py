"""T06–T08 at the trainer: it goes on from the newest valid checkpoint and says what it rejected, or ends with 3."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.helpers import assert_one_line_error, assert_same_state, last_line
from tests.vq_gan_3d.conftest import Train
from tests.vq_gan_3d.test_checkpointing import Canary
from vq_gan_3d.checkpointing import load_checkpoint, save_checkpoint

MORE = ("training.max_steps=4", "training.checkpoint_every_n_steps=1", "ckpt_path=last")


@pytest.fixture
def checkpoints(train: Train, tmp_path: Path) -> Path:
    """Steps 1, 2 and 3, last, best and final."""
    train("training.max_steps=3", "training.checkpoint_every_n_steps=1")
    return tmp_path / "outputs/checkpoints"


def damage(path: Path) -> None:
    times = path.stat().st_mtime_ns
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    os.utime(path, ns=(times, times))


def test_t06_t07_the_newest_valid_one_is_used(train: Train, checkpoints: Path, tmp_path: Path) -> None:
    final = load_checkpoint(checkpoints / "final.ckpt")
    for name in ("last.ckpt", "final.ckpt", "best.ckpt", "epoch_00_step_0003.ckpt"):
        damage(checkpoints / name)
    result = train("training.max_steps=3", "training.checkpoint_every_n_steps=1", "ckpt_path=last")
    for text in (result.stderr, (tmp_path / "outputs/logs/training.log").read_text()):
        for name in ("last.ckpt", "final.ckpt", "best.ckpt", "epoch_00_step_0003.ckpt"):
            assert f"rejected outputs/checkpoints/{name}: damaged" in text
        assert "resuming from outputs/checkpoints/epoch_00_step_0002.ckpt at step 2" in text
    # the third step was made again, bit for bit
    for key in ("state_dict", "current_model_state", "optimizer_states"):
        assert_same_state(load_checkpoint(checkpoints / "final.ckpt")[key], final[key])


def test_t08_all_damaged_and_none_there(train: Train, checkpoints: Path) -> None:
    for path in checkpoints.glob("*.ckpt"):
        damage(path)
    before = {path: path.read_bytes() for path in checkpoints.iterdir()}
    result = train(*MORE, check=3)
    assert_one_line_error(result, "all 6 checkpoints are damaged", "last.ckpt", "epoch_00_step_0001.ckpt")
    assert {path: path.read_bytes() for path in checkpoints.iterdir()} == before
    assert_one_line_error(train(*MORE, "output_dir=empty", check=3), "empty/checkpoints", "no checkpoint")


@pytest.mark.slow
def test_a_named_checkpoint_must_be_there_and_sound(train: Train, checkpoints: Path, tmp_path: Path) -> None:
    options = ("training.max_steps=4", "output_dir=other")
    for name, reason in (
        ("outputs/checkpoints/none.ckpt", "No such file"),
        ("outputs/checkpoints", "cannot be read"),
        ("outputs/checkpoints/last.ckpt", "damaged"),
    ):
        if reason == "damaged":
            damage(checkpoints / "last.ckpt")
        assert_one_line_error(train(*options, f"ckpt_path={name}", check=3), name, reason)
    # a sound file of ours that no training wrote, and one of Lightning's shape that another program wrote
    save_checkpoint(tmp_path / "foreign.ckpt", {"state_dict": {}})
    assert_one_line_error(train(*options, "ckpt_path=foreign.ckpt", check=3), "foreign.ckpt", "no training checkpoint")
    assert not list((tmp_path / "other/checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["named", "last"])
def test_t38_a_pickle_canary_is_never_executed(train: Train, checkpoints: Path, tmp_path: Path, how: str) -> None:
    victim = tmp_path / "executed"
    content = load_checkpoint(checkpoints / "last.ckpt") | {"payload": Canary(victim)}
    if how == "named":
        save_checkpoint(tmp_path / "canary.ckpt", content)
        result = train("training.max_steps=4", "output_dir=other", "ckpt_path=canary.ckpt", check=3)
    else:
        shutil.rmtree(checkpoints)
        checkpoints.mkdir()
        save_checkpoint(checkpoints / "last.ckpt", content)
        result = train(*MORE, check=3)
    assert_one_line_error(result, "refused")
    assert ("canary" if how == "named" else "last.ckpt") in last_line(result)
    assert not victim.exists()
