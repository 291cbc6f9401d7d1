"""Where volumes come from (phantoms, a folder of NIfTI or of stores) and how they are prepared: once, as stores.

There is one format of prepared volumes, the ``.b2nd`` store: a memory-mapped ``.npy`` is read faster by some
milliseconds, which no training step notices, but takes 2.5 times the disk and has no checksum.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm import tqdm

from dataset.body import body_metadata
from dataset.geometry import resample_to_size
from dataset.pairs_case import named_patient, volume_stem, warn_of_nameless
from dataset.phantom import Phantom, make_phantom
from dataset.prepared import PreparedVolume, body_of, one_maker, own_body, short_hash
from dataset.store import SUFFIX, StoredVolume, open_store, verify_store, write_store
from dataset.verification import find_volumes, verify_files
from dataset.volume_io import AIR_HU, Volume, floored, holds_air, read_nifti, to_int16_hu
from errors import ConfigurationError, InputError

log = logging.getLogger(__name__)
Size = tuple[int, int, int]
# Part of every cache key: raise it when prepared volumes change for the same input.
PREPARATION_VERSION = 4
VERIFIED = "verified.json"  # which cached volumes were read to their last voxel, by size and time


class VolumeSource(Protocol):
    """A volume that can be loaded.

    Attributes:
        name: unique in its cohort; a file's stem or a phantom's number.
        patient: whose volume it is; splits go by it.
        identity: changes when the content does.

    A source may also have ``split``, one of "train", "validation", "test" or None, which data modules honour, and
    ``store``, a `.b2nd` of the volume on its own grid, which is read where it lies.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def patient(self) -> str: ...  # noqa: D102
    @property
    def identity(self) -> str: ...  # noqa: D102

    def load(self) -> Volume:
        """Read or make the volume, on its own grid."""


@dataclass(frozen=True)
class PhantomSource:
    """A procedural thorax; made at its final size, no resampling.

    Attributes:
        seed: of the patient.
        size_dhw: voxels.
        spacing_mm: of the voxels (d, h, w); None: fitted to the patient, so that every thorax fills its volume.
        mirrored: right and left exchanged.
    """

    seed: int
    size_dhw: Size
    spacing_mm: tuple[float, float, float] | None = None
    mirrored: bool = False

    @property
    def name(self) -> str:
        """Name of the phantom patient."""
        return f"phantom_{self.seed:05d}"

    patient = name

    @property
    def identity(self) -> str:
        """Seed and grid say it all."""
        return f"{self.name} {self.size_dhw} {self.spacing_mm}{' mirrored' if self.mirrored else ''}"

    def phantom(self) -> Phantom:
        """Make it, with its ground truth."""
        return make_phantom(self.seed, self.size_dhw, self.spacing_mm, mirrored=self.mirrored)

    def load(self) -> Volume:
        """Make its volume."""
        phantom = self.phantom()
        return Volume(phantom.hu, phantom.affine, source=self.name)


@dataclass(frozen=True)
class FileSource:
    """A volume in a file; the sidecar of the conversion from DICOM names the patient, without one the file's stem.

    Attributes:
        path: of the file.
        split: train, validation or test, where a table says so.
    """

    path: Path
    split: str | None = None

    @property
    def name(self) -> str:
        """File name without .nii, .nii.gz or .b2nd."""
        return volume_stem(self.path)

    @cached_property
    def named_patient(self) -> str | None:
        """The patient whom the sidecar names, None without one."""
        return named_patient(self.path)

    @property
    def patient(self) -> str:
        """Two studies of one patient must not land on two sides."""
        return self.named_patient or self.name


class NiftiSource(FileSource):
    """A NIfTI file."""

    @property
    def identity(self) -> str:
        """Name, size and time of change: a file that was replaced is prepared again."""
        status = self.path.stat()
        return f"{self.path.resolve()} {status.st_size} {status.st_mtime_ns}"

    def load(self) -> Volume:
        """Read the file."""
        return read_nifti(self.path)


class StoreSource(FileSource):
    """A native-grid store, read where it lies."""

    @property
    def store(self) -> Path:
        """The file itself."""
        return self.path

    @property
    def identity(self) -> str:
        """Checksum of the voxels."""
        return open_store(self.path).checksum

    def load(self) -> Volume:
        """Read all voxels, compared with their checksum."""
        stored = verify_store(self.path)
        return Volume(np.asarray(stored.hu), stored.affine, source=str(self.path))


def find_nifti(root_dir: str | None) -> list[NiftiSource]:
    """All NIfTI files below a folder, in a stable order.

    Raises:
        ConfigurationError: no folder was named, or it does not exist.
        InputError: it holds no NIfTI, two files of one name, or a damaged sidecar.
    """
    hint = "point dataset.root_dir at a folder of .nii.gz files, or use dataset=phantom"
    sources = [NiftiSource(path) for path in _find(root_dir, "nifti", (".nii", ".nii.gz"), hint)]
    warn_of_nameless(str(root_dir), [source.named_patient for source in sources])
    return sources


def find_stores(root_dir: str | None) -> list[StoreSource]:
    """All ``.b2nd`` stores below a folder, in a stable order.

    Raises:
        ConfigurationError: no folder was named, or it does not exist.
        InputError: it holds no store, two of one name, or a damaged sidecar.
    """
    hint = "make stores with preprocess/build_store.py and point dataset.root_dir at their folder"
    sources = [StoreSource(path) for path in _find(root_dir, "store", (SUFFIX,), hint)]
    warn_of_nameless(str(root_dir), [source.named_patient for source in sources])
    return sources


def _find(root_dir: str | None, kind: str, suffixes: tuple[str, ...], hint: str) -> list[Path]:
    if not root_dir:
        raise ConfigurationError(f"dataset={kind} needs a folder: {hint}")
    root = Path(root_dir).expanduser()
    if not root.is_dir():
        raise ConfigurationError(f"{root}: no such folder: {hint}")
    paths = find_volumes(root, suffixes, hint)
    names = [volume_stem(path) for path in paths]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"{root}: several files are called {min(twice)}: give each patient a name of its own")
    return paths


def default_cache() -> Path:
    """Folder for prepared volumes of this user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xray2ctpa"


def prepare(source: VolumeSource, size_dhw: Size | None, cache: Path) -> PreparedVolume:
    """Bring a volume into a store, resampled whole (never cropped) to ``size_dhw``, or on its own grid for None.

    A store that has that grid already is used where it lies. A cached one that cannot be opened is made again; whether
    its voxels are sound is for `prepare_all` to see, which remembers what it has verified.

    Raises:
        InputError: the source cannot be read.
        StorageError: the cache cannot be written.
    """
    own: Path | None = getattr(source, "store", None)
    if own is not None:
        stored = open_store(own)
        if size_dhw is None or stored.shape == tuple(size_dhw):
            return PreparedVolume(source.name, own, stored.affine, own_body(source.name, stored, cache), False)
    path = _cached_path(source, size_dhw, cache)
    with one_maker(path):
        stored = _open_cached(path) or _make(source, size_dhw, path)
    return PreparedVolume(source.name, path, stored.affine, body_of(stored))


def _cached_path(source: VolumeSource, size_dhw: Size | None, cache: Path) -> Path:
    return cache / f"{source.name}-{short_hash(f'{PREPARATION_VERSION} {source.identity} {size_dhw}')}{SUFFIX}"


def _open_cached(path: Path) -> StoredVolume | None:
    if not path.exists():
        return None
    try:
        return open_store(path)
    except InputError as error:
        log.warning("%s; cached volume, made again from its source", error)
        return None


def _make(source: VolumeSource, size_dhw: Size | None, path: Path) -> StoredVolume:
    volume = source.load()
    if not holds_air(volume.hu):  # no more than a warning: it may be a crop of tissue
        log.warning("%s: no voxel is below %d HU: is it in HU?", volume.source or source.name, AIR_HU)
    (hu, padded), affine = floored(volume.hu), volume.affine
    if size_dhw is not None and hu.shape != tuple(size_dhw):
        resampled, affine = resample_to_size(hu, affine, size_dhw)
        hu, _, _ = to_int16_hu(resampled)
    metadata = {"name": source.name, "padded_voxels": padded, "body": body_metadata(hu, affine)}
    write_store(path, Volume(hu, affine), metadata)
    return open_store(path)


def prepare_all(
    sources: Sequence[VolumeSource], size_dhw: Size | None, cache: Path, what: str
) -> tuple[list[PreparedVolume], dict[str, str]]:
    """Prepare volumes; one that cannot be read never stops the rest, and a damaged cached one is made again.

    Returns:
        The prepared volumes, and a reason for each that failed, by name.
    """
    prepared, failed = [], {}
    damaged = _damaged(sources, size_dhw, cache)
    for source in tqdm(sources, desc=f"preparing {what}", unit="volume", disable=not sys.stderr.isatty()):
        try:
            if (own := getattr(source, "store", None)) in damaged:
                raise InputError(damaged[own])
            prepared.append(prepare(source, size_dhw, cache))
        except InputError as error:
            failed[source.name] = str(error)
    return prepared, failed


def _damaged(sources: Sequence[VolumeSource], size_dhw: Size | None, cache: Path) -> dict[Path, str]:
    """Remove cached volumes whose voxels are not what was written; the user's own stores like that, with the reason.

    All are read to their last voxel before the first step; those verified before are not read again.
    """
    own, cached = [], []
    for source in sources:
        with contextlib.suppress(InputError, OSError):  # told when it is prepared
            store: Path | None = getattr(source, "store", None)
            if store is not None and (size_dhw is None or open_store(store).shape == tuple(size_dhw)):
                own.append(store)
            elif (path := _cached_path(source, size_dhw, cache)).exists():
                cached.append(path)
    bad = {}
    for file in verify_files([*own, *cached], cache / VERIFIED):
        if file.without_air:
            log.warning("%s", file.reason)
        else:
            bad[Path(file.path)] = file.reason
    for path in bad.keys() & set(cached):
        log.warning("%s; cached volume, made again from its source", bad[path])
        path.unlink(missing_ok=True)
    return {path: bad[path] for path in bad.keys() & set(own)}
