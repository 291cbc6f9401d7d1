"""What `generate_samples` needs is on the disk for as long as it looks at a case, and nothing of it stays."""

from __future__ import annotations

import errno
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dataset.phantom import make_phantom
from dataset.store import write_store
from dataset.volume_io import Volume, read_nifti
from errors import StorageError
from patchwise_512x512x604.evaluation_set import Model
from patchwise_512x512x604.utils.scratch import ScratchVolume
from tests.helpers import assert_one_line_error
from tests.patchwise.conftest import Script


def test_a_scratch_volume_is_what_was_written_and_leaves_nothing(tmp_path: Path) -> None:
    hu = np.random.default_rng(0).integers(-1000, 1000, (9, 5, 7)).astype(np.int16)
    with ScratchVolume(tmp_path, (9, 5, 7)) as volume:
        for first in (0, 4, 8):
            volume.append(hu[first : first + 4, :, ::-1])  # whatever its strides
        seen = volume.array()
        assert np.array_equal(seen, hu[:, :, ::-1])
        assert not seen.flags.writeable
        assert not list(tmp_path.iterdir())  # a kill leaves nothing either
    assert seen[8, 4, 0] == hu[8, 4, 6]  # what is mapped stays for those who look at it


def test_a_folder_or_disk_that_refuses_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="nowhere: a file of 2 MB cannot be written there"):
        ScratchVolume(tmp_path / "nowhere", (10, 400, 250))

    def full(data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = SimpleNamespace(write=full, close=lambda: None)
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **options: file)
    with ScratchVolume(tmp_path, (1, 2, 2)) as volume, pytest.raises(StorageError, match="No space left"):
        volume.append(np.zeros((1, 2, 2), np.int16))


def copy_slices(model: Model, hu: np.ndarray, write: Callable[[int, np.ndarray], None] | None = None) -> object:
    """A codec that changes nothing, 8 slices at a time."""
    if write is None:
        return SimpleNamespace(hu=np.array(hu[:]), seconds=1.0)
    for first in range(0, hu.shape[0], 8):
        write(first, hu[first : first + 8])
    return SimpleNamespace(hu=None, seconds=1.0)


def test_samples_of_a_store_are_never_held(
    script: Script, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not the volume, not its reconstruction, not what is shown: less than one of the three."""
    phantom = make_phantom(3, (30, 128, 128))
    hu = np.tile(phantom.hu, (20, 1, 1))  # 20 MB
    write_store(tmp_path / "long.b2nd", Volume(hu, phantom.affine), {})
    monkeypatch.setattr(Model, "reconstruct", copy_slices)
    tracemalloc.start()
    try:
        options = ("--data_dir", "long.b2nd", "--output", "out", "--video_frames", 0)
        script("generate_samples", "--checkpoint", checkpoint, *options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 0.8 * hu.nbytes, f"{peak / 1e6:.0f} MB for a volume of {hu.nbytes / 1e6:.0f} MB"
    assert np.array_equal(read_nifti("out/long.nii.gz").hu, hu)
    assert {path.name for path in Path("out").iterdir()} == {"long.nii.gz", "long.png"}


def test_a_full_disk_is_one_line(
    script: Script, checkpoint: Path, volumes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(volume: ScratchVolume, slices: np.ndarray) -> None:
        raise StorageError("out: a file of 1 MB cannot be written there (No space left on device)")

    monkeypatch.setattr(ScratchVolume, "append", full)
    options = ("--data_dir", volumes, "--output", "out")
    assert_one_line_error(script("generate_samples", "--checkpoint", checkpoint, *options, check=6), "No space left")
