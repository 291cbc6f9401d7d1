"""T42: bad files and failing data workers: skipped and named up to a share, and an end with a reason beyond it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dataset.data_module import VolumeDataModule
from dataset.prepared import PreparedVolume
from dataset.volume_dataset import VolumeDataset
from dataset.volume_io import Volume, write_nifti
from tests.helpers import assert_one_line_error
from tests.vq_gan_3d.conftest import Train
from vq_gan_3d.checkpointing import load_checkpoint

# index (d, h, w, 1) -> RAS+ mm at 2 mm
AFFINE = np.array([[0, 0, -2.0, 0], [0, -2.0, 0, 0], [2.0, 0, 0, 0], [0, 0, 0, 1]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty tiny NIfTI files."""
    target = tmp_path / "ct"
    target.mkdir()
    rng = np.random.default_rng(0)
    for number in range(20):
        hu = rng.integers(-1000, 1000, (16, 32, 32)).astype(np.int16)
        write_nifti(target / f"patient_{number:02d}.nii.gz", Volume(hu, AFFINE))
    return target


def damage(path: Path) -> bytes:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64
    path.write_bytes(content)
    return bytes(content)


def nifti(folder: Path, *more: str) -> list[str]:
    held_out = "dataset.validation=[patient_00,patient_01]"
    return ["dataset=nifti", f"dataset.root_dir={folder}", "dataset.size=[16,32,32]", held_out, *more]


@pytest.mark.parametrize(
    "number", [7, pytest.param(0, marks=pytest.mark.slow)]
)  # of the training set, and one that is held out
def test_t42_one_of_twenty_is_skipped_and_named(train: Train, folder: Path, tmp_path: Path, number: int) -> None:
    name = f"patient_{number:02d}.nii.gz"
    content = damage(folder / name)
    more = ["training.max_steps=3", f"dataset.max_bad_fraction={0.1 if number else 0.5}"]
    result = train(*nifti(folder, *more), check=4)
    for text in (result.stderr, (tmp_path / "outputs/logs/training.log").read_text()):
        assert f"skipped {folder / name}: " in text
    assert "Traceback" not in result.stderr
    assert int(load_checkpoint(tmp_path / "outputs/checkpoints/final.ckpt")["current_model_state"]["steps"]) == 3
    assert (folder / name).read_bytes() == content


def test_t42_over_the_cap(train: Train, folder: Path, tmp_path: Path) -> None:
    for number in (5, 9):
        damage(folder / f"patient_{number:02d}.nii.gz")
    result = train(*nifti(folder, "training.max_steps=3"), check=3)
    assert_one_line_error(result, "2 of 18 training volumes", "dataset.max_bad_fraction=0.1", "patient_05.nii.gz")
    assert not list((tmp_path / "outputs/checkpoints").iterdir())


@pytest.fixture
def after_preparation(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[VolumeDataModule], None]], None]:
    """Do something between preparation and training."""

    def arrange(action: Callable[[VolumeDataModule], None]) -> None:
        build = VolumeDataModule.build

        def build_and_act(self: VolumeDataModule, rank: int, world_size: int) -> object:
            sampler = build(self, rank, world_size)
            action(self)
            return sampler

        monkeypatch.setattr(VolumeDataModule, "build", build_and_act)

    return arrange


@pytest.mark.slow
@pytest.mark.parametrize("split", ["training", "validation"])
@pytest.mark.parametrize("how", ["truncated", "foreign"])
def test_a_cached_volume_damaged_after_preparation(
    train: Train, folder: Path, after_preparation: Callable[..., None], split: str, how: str
) -> None:
    damaged: list[PreparedVolume] = []

    def spoil(data: VolumeDataModule) -> None:
        volume = data.datasets[split].volumes[0]
        content = volume.path.read_bytes()
        if how == "truncated":
            volume.path.write_bytes(content[:-100])
        else:
            volume.path.write_bytes(b"no store " * 500)
        damaged.append(volume)

    after_preparation(spoil)
    workers = "training.num_workers=1" if (how, split) == ("foreign", "training") else "training.num_workers=0"
    result = train(*nifti(folder, "training.num_epochs=1", workers), check=4)
    assert f"skipped {damaged[0].path}: cached volume of {damaged[0].name} is damaged" in result.stderr
    assert result.stderr.count("skipped ") == 1


@pytest.mark.slow
def test_cached_volumes_over_the_cap(train: Train, folder: Path, after_preparation: Callable[..., None]) -> None:
    def spoil(data: VolumeDataModule) -> None:
        for volume in data.datasets["training"].volumes[:3]:
            volume.path.write_bytes(b"")

    after_preparation(spoil)
    result = train(*nifti(folder, "training.num_epochs=1"), check=3)
    assert_one_line_error(result, "3 of 20 samples", "dataset.max_bad_fraction", "is damaged")


@pytest.mark.slow
def test_a_resumed_run_still_tells_what_was_skipped_before(
    train: Train, folder: Path, after_preparation: Callable[..., None]
) -> None:
    """The cached volume is made again from its source, so that the continuation itself skips nothing."""
    spoilt: list[str] = []

    def spoil_once(data: VolumeDataModule) -> None:
        if not spoilt:
            volume = data.datasets["training"].volumes[0]
            volume.path.write_bytes(b"")
            spoilt.append(volume.name)

    after_preparation(spoil_once)
    train(*nifti(folder, "training.num_epochs=1"), check=4)
    result = train(*nifti(folder, "training.num_epochs=2", "ckpt_path=last"), check=4)
    assert result.stderr.count("skipped ") == 1
    assert spoilt[0] in result.stderr


def raises(self: VolumeDataset, volume: PreparedVolume, epoch: int, index: int) -> None:
    raise ZeroDivisionError("an accident")


def hangs(self: VolumeDataset, volume: PreparedVolume, epoch: int, index: int) -> None:
    time.sleep(1000)


def is_killed(self: VolumeDataset, volume: PreparedVolume, epoch: int, index: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    "in_training", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["training", "validation"]
)
@pytest.mark.parametrize(
    ("accident", "workers", "words"),
    [
        pytest.param(raises, 0, ["ZeroDivisionError: an accident"], marks=pytest.mark.slow),
        (raises, 1, ["ZeroDivisionError: an accident"]),
        pytest.param(hangs, 1, ["timed out", "worker_timeout_s"], marks=pytest.mark.slow),
        pytest.param(is_killed, 1, ["a data worker failed"], marks=pytest.mark.slow),
    ],
    ids=["raises in process", "raises", "hangs", "is killed"],
)
def test_t42_a_worker_that_fails(
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
    accident: Callable[..., None],
    workers: int,
    words: list[str],
    in_training: bool,
) -> None:
    sample = VolumeDataset._sample

    def sample_or_fail(self: VolumeDataset, volume: PreparedVolume, epoch: int, index: int) -> object:
        chosen = self.random and volume.name == "phantom_00004" if in_training else not self.random
        return (accident if chosen else sample)(self, volume, epoch, index)

    monkeypatch.setattr(VolumeDataset, "_sample", sample_or_fail)
    options = [f"training.num_workers={workers}", "training.worker_timeout_s=3", "training.num_epochs=1"]
    began = time.monotonic()
    result = train(*options, check=3)
    assert_one_line_error(result, "phantom_00004" if in_training else "phantom_00000", *words)
    assert time.monotonic() - began < 45
