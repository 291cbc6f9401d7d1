"""Volumes that are written slice by slice, looked at as arrays, and then gone: on the disk instead of in memory.

Written through a file and not through a memory map: a disk that is full refuses a write with an error, and a store into
a map with a signal that ends the process.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from errors import StorageError


class ScratchVolume:
    """An int16 volume in a file without a name: it is gone when the block ends, and also when the process is killed.

    Args:
        folder: where the file is made, 2 bytes a voxel.
        shape_dhw: of the volume.

    Raises:
        StorageError: the folder refuses.
    """

    def __init__(self, folder: Path, shape_dhw: tuple[int, ...]) -> None:
        self.folder = folder
        self.shape_dhw = shape_dhw
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  # closed by __exit__
        except OSError as error:
            raise self._refused(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, slices: np.ndarray) -> None:
        """Write the next slices (d, H, W).

        Raises:
            StorageError: the disk refuses.
        """
        left = np.ascontiguousarray(slices, np.int16).data.cast("B")
        try:
            while left:
                left = left[self._file.write(left) :]  # a write without a buffer may take a part
        except OSError as error:
            raise self._refused(error) from error

    def array(self) -> np.ndarray:
        """The volume (D, H, W), read-only, once all slices are written; pages that are looked at, and no more."""
        return np.memmap(self._file, np.int16, "r", shape=self.shape_dhw)

    def _refused(self, error: OSError) -> StorageError:
        needed = 2 * int(np.prod(self.shape_dhw, dtype=np.int64)) / 1e6
        return StorageError(f"{self.folder}: a file of {needed:.0f} MB cannot be written there ({error.strerror})")
