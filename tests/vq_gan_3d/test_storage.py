"""T03–T05: a disk that is full or refuses ends the run with 6; what was saved before stays as it was."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import BASELINE, assert_one_line_error, run
from tests.vq_gan_3d.conftest import Train
from vq_gan_3d.checkpointing import find_resumable, load_checkpoint

EVERY = "training.checkpoint_every_n_steps=1"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.ckpt")}


def assert_nothing_lost(before: dict[str, bytes], folder: Path) -> None:
    after = contents(folder)
    assert {name: after.get(name) == content for name, content in before.items()} == dict.fromkeys(before, True)
    load_checkpoint(find_resumable(folder)[0])
    assert not list(folder.glob(".*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk(train: Train, small_disk: Path) -> None:
    train("training.max_steps=2", EVERY, f"output_dir={small_disk}/run")
    checkpoints = small_disk / "run/checkpoints"
    before = contents(checkpoints)
    free = small_disk / "ballast"
    size = 8 * 2**20 - sum(path.stat().st_size for path in small_disk.rglob("*") if path.is_file()) - 600_000
    free.write_bytes(bytes(size))  # what is left is less than a checkpoint
    result = train("training.max_steps=6", EVERY, f"output_dir={small_disk}/run", "ckpt_path=last", check=6)
    assert_one_line_error(result, str(small_disk), "disk is full")
    assert_nothing_lost(before, checkpoints)
    free.unlink()
    train("training.max_steps=6", EVERY, f"output_dir={small_disk}/run", "ckpt_path=last")


@pytest.mark.slow
def test_disk_without_a_byte(train: Train, small_disk: Path) -> None:
    """Logs and TensorBoard fail first."""
    train("training.max_steps=2", EVERY, f"output_dir={small_disk}/run")
    before = contents(small_disk / "run/checkpoints")
    with (small_disk / "ballast").open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                break
    result = train("training.max_steps=9", EVERY, f"output_dir={small_disk}/run", "ckpt_path=last", check=6)
    assert_one_line_error(result, str(small_disk))
    assert_nothing_lost(before, small_disk / "run/checkpoints")


@pytest.mark.slow
def test_disk_that_fills_up_in_tensorboard(train: Train, small_disk: Path) -> None:
    """The TensorBoard writer has a thread of its own; its failure must be one line too."""
    (small_disk / "ballast").write_bytes(bytes(8 * 2**20 - 3 * 1_000_000))
    result = train("training.max_steps=60", f"output_dir={small_disk}/run", "logger.every_n_steps=1", check=6)
    assert_one_line_error(result, str(small_disk))


@pytest.mark.slow
def test_file_size_limit(train: Train, tmp_path: Path) -> None:
    train("training.max_steps=2", EVERY)
    before = contents(tmp_path / "outputs/checkpoints")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, limits[1]))  # Python ignores SIGXFSZ: writes fail with EFBIG
    try:
        result = train("training.max_steps=4", EVERY, "ckpt_path=last", "logger.tensorboard=false", check=6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_one_line_error(result, "outputs/checkpoints/epoch_00_step_0003.ckpt", "ulimit -f")
    assert_nothing_lost(before, tmp_path / "outputs/checkpoints")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_temporary_folder_unusable(tmp_path: Path, workers: int) -> None:
    run(BASELINE, "training.max_steps=2", f"training.num_workers={workers}", cwd=tmp_path, TMPDIR="/proc/nowhere")
    load_checkpoint(tmp_path / "outputs/checkpoints/final.ckpt")


@pytest.mark.slow
def test_temporary_folder_full(tmp_path: Path, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(8 * 2**20 - 4096))
    run(BASELINE, "training.max_steps=2", cwd=tmp_path, TMPDIR=str(small_disk))
    load_checkpoint(tmp_path / "outputs/checkpoints/final.ckpt")


def test_unwritable_folders_are_told_before_the_first_step(train: Train, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder, name in ((f"{tmp_path}/file/run", "file/run/checkpoints"), ("/proc/run", "/proc/run/checkpoints")):
        result = train("training.max_steps=2", f"output_dir={folder}", check=6)
        assert_one_line_error(result, name, "choose another output_dir")
        assert "volumes:" not in result.stderr  # nothing was prepared
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["logs", "validation_results", "config.yaml", "tensorboard_logs"])
def test_a_part_of_the_output_is_in_the_way(train: Train, tmp_path: Path, name: str) -> None:
    (tmp_path / "outputs").mkdir()
    blocker = tmp_path / "outputs" / name
    blocker.mkdir() if name == "config.yaml" else blocker.write_text("mine")
    assert_one_line_error(train("training.max_steps=2", check=6), f"outputs/{name}")
    assert blocker.is_dir() or blocker.read_text() == "mine"


def test_a_cache_that_cannot_be_written(train: Train) -> None:
    result = train("training.max_steps=2", "dataset.cache_dir=/proc/cache", check=6)
    assert_one_line_error(result, "/proc/cache", "dataset.cache_dir")
