"""Every volume file read to its last byte once, and remembered: a run over thousands of good files takes seconds.

A NIfTI file is good if its header, geometry, gzip checksum and every voxel are (`dataset.volume_io.read_nifti`); a
store if its checksums hold (`dataset.store.verify_store`). Either must hold air, else it is hardly in HU; crops of
tissue hold none, so that this finding is told apart.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from dataset.atomic import atomic_write
from dataset.volume_io import AIR_HU, NO_GEOMETRY, holds_air, read_nifti, without_geometry
from errors import ConfigurationError, InputError, StorageError, one_line

log = logging.getLogger(__name__)
NIFTI_SUFFIXES = (".nii", ".nii.gz")
STORE_SUFFIX = ".b2nd"
VOLUME_SUFFIXES = (*NIFTI_SUFFIXES, STORE_SUFFIX)
# Part of the cache: raise it when a check is added, and everything is checked again.
VERIFICATION_VERSION = 3
_WITHOUT_AIR = f"no voxel is below {AIR_HU} HU, so it is not in HU or a crop of tissue: look at it, convert it again"
_SAVE_EVERY_S = 60.0
Stamp = list[int]  # size in bytes, time of change and of the inode's change in ns


@dataclass(frozen=True)
class BadFile:
    """A file that must not be trained on.

    Attributes:
        path: the file.
        kind: ``NIfTI`` or ``store``.
        reason: what is wrong and what to do, in one line that begins with the path.
        without_air: sound, but without a voxel of air; the caller may know it for a crop of tissue.
    """

    path: str
    kind: str
    reason: str
    without_air: bool = False


def find_volumes(
    folder: Path, suffixes: Sequence[str] = VOLUME_SUFFIXES, hint: str = "give another folder"
) -> list[Path]:
    """All volume files below a folder, hidden ones left out, in a stable order; a file is taken as it is.

    Args:
        folder: searched recursively.
        suffixes: of the names, in lower case; hidden files are temporary, or what other systems leave beside theirs.
        hint: what to do where there is none.

    Raises:
        ConfigurationError: there is no such folder.
        InputError: it holds no volume.
    """
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise ConfigurationError(f"{folder}: no such folder: give one with {' or '.join(suffixes)} files")
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.name.lower().endswith(tuple(suffixes)) and not path.name.startswith(".")
    ]
    if not found:
        raise InputError(f"{folder}: holds no {' or '.join(suffixes)} file: {hint}")
    return found


def kind_of(path: Path) -> str:
    """``store`` or ``NIfTI``, by the name of the file."""
    return "store" if path.name.lower().endswith(STORE_SUFFIX) else "NIfTI"


def verify_file(path: Path) -> BadFile | None:
    """Check one file in full.

    Args:
        path: a NIfTI file or a store.

    Returns:
        None if it is good.

    Raises:
        MemoryExhaustedError: it is sound but does not fit into memory.
    """
    kind = kind_of(path)
    try:
        if kind == "store":
            from dataset.store import verify_store  # loads the compressor, which NIfTI need not wait for

            stored = verify_store(path)
            has_air = stored.lowest_hu is not None and stored.lowest_hu < AIR_HU
            affine, shape = stored.affine, stored.shape
        else:
            volume = read_nifti(path)
            has_air = holds_air(volume.hu)
            affine, shape = volume.affine, volume.hu.shape
    except InputError as error:
        return BadFile(str(path), kind, one_line(error))
    if without_geometry(affine, shape):  # no more than a warning, when the file is read: it may be true
        log.warning("%s: %s", path, NO_GEOMETRY)
    return None if has_air else _without_air(path)


def _without_air(path: Path) -> BadFile:
    return BadFile(str(path), kind_of(path), one_line(f"{path}: {_WITHOUT_AIR}"), without_air=True)


def verify_files(paths: Sequence[Path], cache: Path | None, *, threads: int = 1) -> list[BadFile]:
    """Check files, except those that were found sound before and have not changed since.

    Args:
        paths: NIfTI files and stores.
        cache: JSON file that remembers the sound ones by size and time, and which of them hold no air; None remembers
            nothing. A damaged or unwritable one costs only time, and a warning.
        threads: files checked at the same time; each takes its volume's int16 size in memory.

    Returns:
        The bad ones and those without air, in the order of ``paths``.

    Raises:
        MemoryExhaustedError: a file is sound but does not fit into memory.
    """
    memory = _Memory(cache)
    stamps = [_stamp(path) for path in paths]
    known = [memory.knows(path, stamp) for path, stamp in zip(paths, stamps, strict=True)]
    unknown = [(path, stamp) for path, stamp, air in zip(paths, stamps, known, strict=True) if air is None]
    bad = {path: _without_air(path) for path, air in zip(paths, known, strict=True) if air is False}
    bar = tqdm(total=len(unknown), desc="verifying", unit="file", disable=not sys.stderr.isatty() or not unknown)
    try:
        with bar:
            for path, stamp, found in _checked(unknown, max(1, threads)):
                if found is not None:
                    bad[path] = found
                is_sound = found is None or found.without_air
                if is_sound and stamp is not None and stamp == _stamp(path):  # not replaced while we read it
                    memory.remember(path, stamp, has_air=found is None)
                bar.update()
    finally:
        memory.save()
    return [bad[path] for path in paths if path in bad]


def _checked(
    files: Iterable[tuple[Path, Stamp | None]], threads: int
) -> Iterator[tuple[Path, Stamp | None, BadFile | None]]:
    """Check files in threads (decompression releases the interpreter's lock), a few at a time."""
    if threads == 1:
        for path, stamp in files:
            yield path, stamp, verify_file(path)
        return
    pending: dict[Future[BadFile | None], tuple[Path, Stamp | None]] = {}
    todo = iter(files)
    with ThreadPoolExecutor(threads) as pool:
        try:
            while True:
                for path, stamp in islice(todo, 2 * threads - len(pending)):
                    pending[pool.submit(verify_file, path)] = path, stamp
                if not pending:
                    return
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    yield *pending.pop(future), future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _stamp(path: Path) -> Stamp | None:
    """What changes when a file does; its inode's time, too, for copies that keep the time of their original."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


class _Memory:
    """The cache: ``{"version": …, "good": {absolute path: stamp}, "without_air": {absolute path: stamp}}``."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._good: dict[str, Stamp] = {}
        self._without_air: dict[str, Stamp] = {}
        self._changed = False
        self._next_save = time.monotonic() + _SAVE_EVERY_S
        if path is None or not path.exists():
            return
        try:
            content = json.loads(path.read_bytes())
            if content["version"] == VERIFICATION_VERSION:
                self._good, self._without_air = dict(content["good"]), dict(content["without_air"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            log.warning("%s: damaged cache, every file is checked again (%s)", path, one_line(error))

    def knows(self, path: Path, stamp: Stamp | None) -> bool | None:
        """Whether a sound file holds air; None where it is not known to be sound."""
        name = os.path.abspath(path)
        if stamp is not None and stamp in (self._good.get(name), self._without_air.get(name)):
            return self._good.get(name) == stamp
        return None

    def remember(self, path: Path, stamp: Stamp, *, has_air: bool) -> None:
        name = os.path.abspath(path)
        known, other = (self._good, self._without_air) if has_air else (self._without_air, self._good)
        known[name] = stamp
        other.pop(name, None)
        self._changed = True
        if time.monotonic() > self._next_save:
            self.save()

    def save(self) -> None:
        if self._path is None or not self._changed:
            return
        content = {"version": VERIFICATION_VERSION, "good": dict(sorted(self._good.items())),
                   "without_air": dict(sorted(self._without_air.items()))}  # fmt: skip
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self._path) as handle:
                handle.write(json.dumps(content, indent=0).encode())
        except (StorageError, OSError) as error:
            log.warning("%s: what was verified cannot be remembered (%s)", self._path, one_line(error))
        self._changed = False
        self._next_save = time.monotonic() + _SAVE_EVERY_S
