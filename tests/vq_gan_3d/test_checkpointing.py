"""T06–T08 and T38 on files: a damaged, foreign or hostile checkpoint is refused, and never executed."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from errors import InputError, StorageError
from tests.helpers import assert_same_state
from vq_gan_3d.checkpointing import (
    MAGIC,
    TRAILER_BYTES,
    copy_checkpoint,
    find_resumable,
    is_writable,
    load_checkpoint,
    newest_first,
    save_checkpoint,
    verify_checkpoint,
)

CONTENT = {
    "state_dict": {"weight": torch.arange(5000.0), "steps": torch.tensor(3)},
    "names": ["a", ("b", 2.5, None)],
    "flag": True,
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "last.ckpt"
    save_checkpoint(path, CONTENT)
    return path


def seal(path: Path, content: bytes) -> None:
    """A trailer as ours: what an attacker, or a bug, would add."""
    path.write_bytes(content + MAGIC + hashlib.sha256(content).digest())


def aged(path: Path, seconds: float) -> Path:
    os.utime(path, (1e9 + seconds, 1e9 + seconds))
    return path


def test_round_trip_here_and_in_plain_torch(checkpoint: Path) -> None:
    assert_same_state(load_checkpoint(checkpoint), CONTENT)
    assert_same_state(torch.load(checkpoint, weights_only=True), CONTENT)
    before = verify_checkpoint(checkpoint)
    copy_checkpoint(checkpoint, checkpoint.with_name("copy.ckpt"))
    assert verify_checkpoint(checkpoint.with_name("copy.ckpt")) == before
    assert checkpoint.stat().st_ino != checkpoint.with_name("copy.ckpt").stat().st_ino


@pytest.mark.parametrize("sixteenth", range(16))
def test_t06_truncated(checkpoint: Path, sixteenth: int) -> None:
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: len(whole) * sixteenth // 16])
    with pytest.raises(InputError, match=rf"{checkpoint.name}: (truncated|no checkpoint)"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("missing", [1, 8, TRAILER_BYTES - 1, TRAILER_BYTES])
def test_truncated_in_its_trailer(checkpoint: Path, missing: int) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:-missing])
    with pytest.raises(InputError, match=checkpoint.name):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("region", range(17))  # the last one is the trailer
def test_t07_one_bit_flipped(checkpoint: Path, region: int) -> None:
    content = bytearray(checkpoint.read_bytes())
    body = len(content) - TRAILER_BYTES
    at = body * region // 16 + 7 if region < 16 else len(content) - 1
    content[at] ^= 1 << (region % 8)
    checkpoint.write_bytes(content)
    with pytest.raises(InputError, match=f"{checkpoint.name}: damaged"):
        load_checkpoint(checkpoint)


class Canary:
    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.target,)


def test_t38_a_pickle_canary_with_a_valid_trailer_is_refused_not_executed(tmp_path: Path) -> None:
    path, victim = tmp_path / "canary.ckpt", tmp_path / "executed"
    save_checkpoint(path, {"state_dict": {}, "payload": Canary(victim)})
    verify_checkpoint(path)
    with pytest.raises(InputError, match="refused"):
        load_checkpoint(path)
    for protocol in (0, 2, 4):
        bare = tmp_path / f"bare_{protocol}.ckpt"
        seal(bare, pickle.dumps(Canary(victim), protocol))
        with pytest.raises(InputError, match=bare.name):
            load_checkpoint(bare)
    assert not victim.exists()
    torch.load(path, weights_only=False)  # the canary works
    assert victim.exists()


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04" + bytes(100), bytes(5000), b"{}" * 500])
def test_foreign_content_with_a_valid_trailer(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign.ckpt"
    seal(path, content)
    with pytest.raises(InputError, match=r"foreign\.ckpt"):
        load_checkpoint(path)


def test_no_dictionary(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "list.ckpt", [1, 2])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="holds a list"):
        load_checkpoint(tmp_path / "list.ckpt")


def test_missing_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        load_checkpoint(tmp_path / "none.ckpt")
    (tmp_path / "folder.ckpt").mkdir()
    with pytest.raises(InputError, match=r"folder\.ckpt"):
        load_checkpoint(tmp_path / "folder.ckpt")


def test_the_newest_valid_one_is_found_and_the_rejected_are_named(tmp_path: Path) -> None:
    names = ["epoch_00_step_0001.ckpt", "epoch_00_step_0002.ckpt", "epoch_00_step_0003.ckpt", "last.ckpt"]
    for age, name in enumerate(names):
        save_checkpoint(tmp_path / name, CONTENT)
        aged(tmp_path / name, min(age, 2))  # last.ckpt is as old as the one it copies, and comes first
    assert [path.name for path in newest_first(tmp_path)] == [names[3], names[2], names[1], names[0]]
    assert find_resumable(tmp_path) == (tmp_path / "last.ckpt", [])
    for name in names[2:]:
        (tmp_path / name).write_bytes(b"damaged" * 100)
        aged(tmp_path / name, 2)
    path, rejected = find_resumable(tmp_path)
    assert path.name == names[1]
    assert [Path(line.split(":")[0]).name for line in rejected] == ["last.ckpt", names[2]]
    for name in names[:2]:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match="all 4 checkpoints are damaged"):
        find_resumable(tmp_path)


def test_the_newest_is_the_one_with_most_steps_whatever_its_time(tmp_path: Path) -> None:
    """A run that was copied without its times: all are as old as the copying made them."""
    steps = {"epoch_00_step_0002.ckpt": 2, "best.ckpt": 5, "epoch_02_step_0010.ckpt": 10, "last.ckpt": 10}
    for age, (name, count) in enumerate(reversed(steps.items())):
        state = {"steps": torch.tensor(count), "weight": torch.zeros(10)}
        save_checkpoint(tmp_path / name, {"state_dict": state, "current_model_state": state})
        aged(tmp_path / name, age)
    order = ["epoch_02_step_0010.ckpt", "last.ckpt", "best.ckpt", "epoch_00_step_0002.ckpt"]
    assert [path.name for path in newest_first(tmp_path)] == order
    (tmp_path / "epoch_00_step_0002.ckpt").write_bytes(b"")  # damaged, but older by its name: nothing to tell
    assert find_resumable(tmp_path) == (tmp_path / order[0], [])
    (tmp_path / "best.ckpt").write_bytes(b"x" * 100)  # damaged, and nobody knows how old
    path, (reason,) = find_resumable(tmp_path)
    assert path.name == order[0]
    assert "best.ckpt" in reason


def test_nothing_to_resume(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match="no checkpoint to resume from"):
            find_resumable(folder)


def test_a_save_that_fails_leaves_the_old_one(checkpoint: Path) -> None:
    before = checkpoint.read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_checkpoint(checkpoint, {"weights": torch.zeros(100_000), "bad": lambda: None})
    assert checkpoint.read_bytes() == before
    assert os.listdir(checkpoint.parent) == [checkpoint.name]


def test_the_probe_of_a_folder(tmp_path: Path) -> None:
    is_writable(tmp_path / "new" / "folder")
    assert os.listdir(tmp_path / "new" / "folder") == []
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file/checkpoints: cannot be created"):
        is_writable(tmp_path / "file" / "checkpoints")
    with pytest.raises(StorageError, match="/proc/"):
        is_writable(Path("/proc/xray2ctpa"))
