"""The native-grid store: one volume as int16 HU in one file, of which any patch can be read without the rest.

A ``.b2nd`` file (blosc2) that numpy users can open with ``blosc2.open(path)[...]``. Inside, beside the voxels
(D, H, W): a record with marker and version, shape, affine, spacing, metadata and the SHA-256 of the voxels, of
their compressed bytes and of itself.

Handles are opened by the process that reads (a `StoredVolume` pickles as its path), and blosc2 always runs on one
thread: its pool gives no speed on patches, does not survive a fork, and writes blocks in the order in which its threads
finish, so that the same volume would give other bytes each time. Parallelism comes from loader workers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import blosc2
import numpy as np

from dataset.atomic import atomic_write
from dataset.geometry import checked_affine, spacing_mm
from dataset.store_frame import MAX_RECORD_BYTES, RECORD_NAME, Shape, data_sha256, frame_sha256, read_frame
from dataset.volume_io import Volume, to_int16_hu
from errors import InputError, one_line

SUFFIX = ".b2nd"
MARKER = "xray2ctpa volume store"
VERSION = 2
# Fitted to patches of (128, 256, 256) in a (604, 512, 512) chest; `benchmarks/patches.py` measures it. Small blocks
# waste little at a patch's border, but each costs a call; whole blocks are read, never whole chunks.
CHUNKS_DHW = (32, 128, 128)
BLOCKS_DHW = (16, 32, 64)
# What bit shuffling leaves of a CT is noise, on which the codec matters little for size and much for speed. Processor
# time of a patch, speed of writing and share of raw int16 on lidc_0001 (2026-11-23): LZ4 at level 9 24 ms, 316 MB/s,
# 44.0 %; LZ4HC 3 26 ms, 61 MB/s, 42.2 %; Zstd 1 46 ms, 221 MB/s, 40.0 %. On lidc_0002 LZ4 leaves 33.1 %, on a phantom
# 49 %.
_CODEC = blosc2.Codec.LZ4
_COMPRESSION_LEVEL = 9


class LazyHU:
    """Voxels of a store, (D, H, W) int16, read when they are sliced; slices are numpy arrays of their own.

    Args:
        path: the store.
        shape: voxels (D, H, W).
    """

    dtype = np.dtype(np.int16)
    ndim = 3

    def __init__(self, path: Path, shape: Shape) -> None:
        self.path = path
        self.shape = shape
        self._opened: tuple[int, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "shape": self.shape, "_opened": None}

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        """Read ``key``: integers and slices of any step, an ellipsis.

        Raises:
            InputError: the compressed data is damaged, or the file went away.
        """
        # the shape of the answer, and IndexError as numpy has it, from an array without memory
        wanted = np.broadcast_to(np.int16(0), self.shape)[key].shape
        if 0 in wanted:
            return np.empty(wanted, np.int16)
        try:
            if self._opened is None or self._opened[0] != os.getpid():
                self._opened = os.getpid(), _open(self.path)
            voxels = np.asarray(self._opened[1][key])
        except MemoryError:
            raise
        except Exception as error:  # blosc2 raises whatever its bindings do on damaged bytes
            raise InputError(f"{self.path}: damaged data: build it again ({one_line(error)})") from error
        return voxels.reshape(wanted)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[...], dtype=dtype)


class StoredVolume:
    """A volume in a store; opening reads the record alone.

    Args:
        path: the ``.b2nd`` file.

    Attributes:
        shape: voxels (D, H, W).
        affine: (4, 4) float64, index (d, h, w, 1) -> RAS+ mm.
        metadata: what the writer added.
        checksum: SHA-256 of the voxels (C order, little-endian), as hex.
        lowest_hu: of all voxels, once `verify_store` has read them.

    Raises:
        InputError: no sound store of this project.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.lowest_hu: int | None = None
        frame = read_frame(self.path)
        self.shape = frame.shape
        record = frame.record
        try:
            if record["marker"] != MARKER:
                raise ValueError(f"marker {record['marker']!r}")
            if record["version"] != VERSION:
                raise InputError(f"store version {record['version']!r}, this is {VERSION}: build it again")
            if tuple(record["shape"]) != self.shape:
                raise ValueError(f"record of {record['shape']} voxels for {list(self.shape)}")
            if record.pop("record_sha256") != _digest(record):
                raise ValueError("the record is not what was written (SHA-256)")
            self.affine = checked_affine(record["affine"])
            self.metadata: dict[str, Any] = dict(record["metadata"])
            self.checksum = str(record["sha256"])
            self._data, self._data_sha256 = frame.data, str(record["data_sha256"])
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{self.path}: damaged record: build it again ({one_line(error)})") from error

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel spacing (d, h, w) in mm."""
        return spacing_mm(self.affine)

    @cached_property
    def hu(self) -> LazyHU:
        """The voxels, (D, H, W) int16, read when sliced."""
        return LazyHU(self.path, self.shape)

    def check_data(self) -> None:
        """Compare the compressed voxels with their checksum; nothing is decompressed.

        Raises:
            InputError: they are not what was written.
        """
        try:
            with open(self.path, "rb") as handle:
                sound = data_sha256(handle, self._data) == self._data_sha256
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror or one_line(error)})") from error
        if not sound:
            raise InputError(f"{self.path}: the voxels are not those that were written (SHA-256): build it again")

    def slabs(self) -> Iterator[np.ndarray]:
        """All voxels in order, (<= 32, H, W) at a time."""
        for first in range(0, self.shape[0], CHUNKS_DHW[0]):
            yield self.hu[first : first + CHUNKS_DHW[0]]


def open_store(path: str | os.PathLike[str]) -> StoredVolume:
    """Open a store; the voxels are read when they are sliced.

    Raises:
        InputError: missing, no store of this project, damaged or truncated (damage within the voxels shows when they
            are read, or in `verify_store`).
    """
    return StoredVolume(path)


def write_store(path: str | os.PathLike[str], volume: Volume, metadata: dict[str, Any]) -> None:
    """Write a volume as a store, whole or not at all; the same input gives the same bytes.

    Args:
        path: the file to make or replace, ``.b2nd``.
        volume: standard axes; floats are rounded to int16 HU.
        metadata: anything that JSON holds, 1 MB at most; ``body`` is read by patch sampling (see `patch_sampling`).

    Raises:
        InputError: the volume is empty or not finite, its affine is not usable, or the metadata is too long.
        StorageError: the disk refuses; an earlier file of that name is untouched.
    """
    path = Path(path)
    hu = np.ascontiguousarray(to_int16_hu(volume.hu)[0], dtype="<i2")
    if hu.ndim != 3 or hu.size == 0:
        raise InputError(f"{path}: not written, the volume has shape {hu.shape}, three non-empty axes are needed")
    affine = checked_affine(volume.affine)
    record = {
        "marker": MARKER,
        "version": VERSION,
        "shape": list(hu.shape),
        "affine": affine.tolist(),
        "spacing_mm": list(spacing_mm(affine)),
        "sha256": hashlib.sha256(hu.data).hexdigest(),
        "metadata": metadata,
    }
    array = _compressed(hu)
    record["data_sha256"] = frame_sha256(array.to_cframe())
    record["record_sha256"] = _digest(record)
    text = json.dumps(record, sort_keys=True, allow_nan=False)
    if len(text.encode()) > MAX_RECORD_BYTES // 2:
        raise InputError(f"{path}: not written, its metadata is longer than {MAX_RECORD_BYTES // 2} bytes: shorten it")
    array.schunk.vlmeta[RECORD_NAME] = text
    frame = array.to_cframe()
    with atomic_write(path) as handle:
        handle.write(frame)


def _compressed(hu: np.ndarray) -> Any:
    chunks = tuple(min(n, c) for n, c in zip(hu.shape, CHUNKS_DHW, strict=True))
    blocks = tuple(min(n, b) for n, b in zip(hu.shape, BLOCKS_DHW, strict=True))
    for name in [name for name in os.environ if name.startswith("BLOSC_")]:
        del os.environ[name]  # C-Blosc2 lets BLOSC_NTHREADS, BLOSC_CLEVEL and the like win over what is asked for here
    return blosc2.asarray(
        hu,
        chunks=chunks,
        blocks=blocks,
        cparams=blosc2.CParams(
            codec=_CODEC,
            clevel=_COMPRESSION_LEVEL,
            filters=[blosc2.Filter.BITSHUFFLE],
            nthreads=1,
        ),
        dparams=blosc2.DParams(nthreads=1),
    )


def verify_store(path: str | os.PathLike[str]) -> StoredVolume:
    """Read every voxel and compare with the checksums inside.

    The compressed bytes come first: what is damaged is refused before C-Blosc2 decompresses it, whose slices (3.3.5,
    `b2nd_get_slice`) lose the buffer of a chunk each time that they fail, so that a search through many damaged files
    would eat the memory.

    Returns:
        The opened store, its ``lowest_hu`` filled in.

    Raises:
        InputError: as `open_store`, or a voxel is not what was written.
    """
    stored = open_store(path)
    stored.check_data()
    digest = hashlib.sha256()
    lowest = np.iinfo(np.int16).max
    for slab in stored.slabs():
        digest.update(np.ascontiguousarray(slab, dtype="<i2").data)
        lowest = min(lowest, int(slab.min()))
    if digest.hexdigest() != stored.checksum:
        raise InputError(f"{path}: the voxels are not those that were written (SHA-256): build it again")
    stored.lowest_hu = lowest
    return stored


def _digest(record: dict[str, Any]) -> str:
    """SHA-256 of a record without its own: a flipped bit in an affine is as bad as one in the voxels."""
    return hashlib.sha256(json.dumps(record, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _open(path: Path) -> Any:
    """A blosc2 array over a frame that was checked by `read_frame`."""
    return blosc2.open(str(path), mode="r", dparams=blosc2.DParams(nthreads=1))
