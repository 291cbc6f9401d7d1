"""Where volumes come from: phantoms or a folder of NIfTI, prepared once and cached as memory-mapped int16 HU."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm import tqdm

from dataset.atomic import atomic_write
from dataset.geometry import resample_to_size
from dataset.phantom import make_phantom
from dataset.volume_io import Volume, read_nifti, to_int16_hu
from errors import ConfigurationError, InputError, StorageError

log = logging.getLogger(__name__)
Size = tuple[int, int, int]
# Part of every cache key: raise it when prepared volumes change for the same input.
PREPARATION_VERSION = 1


class VolumeSource(Protocol):
    """A volume that can be loaded.

    Attributes:
        name: unique in its cohort; a file's stem or a phantom's number.
        patient: whose volume it is; splits go by it.
        identity: changes when the content does.
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
    """A procedural thorax; made at its final size, no resampling."""

    seed: int
    size_dhw: Size

    @property
    def name(self) -> str:
        """Name of the phantom patient."""
        return f"phantom_{self.seed:05d}"

    patient = name

    @property
    def identity(self) -> str:
        """Seed and size say it all."""
        return f"{self.name} {self.size_dhw}"

    def load(self) -> Volume:
        """Make the phantom."""
        phantom = make_phantom(self.seed, self.size_dhw)
        return Volume(phantom.hu, phantom.affine, source=self.name)


@dataclass(frozen=True)
class NiftiSource:
    """A NIfTI file; its stem names the patient."""

    path: Path

    @property
    def name(self) -> str:
        """File name without .nii or .nii.gz."""
        return self.path.name.removesuffix(".gz").removesuffix(".nii")

    patient = name

    @property
    def identity(self) -> str:
        """Name, size and time of change: a file that was replaced is prepared again."""
        status = self.path.stat()
        return f"{self.path.resolve()} {status.st_size} {status.st_mtime_ns}"

    def load(self) -> Volume:
        """Read the file."""
        return read_nifti(self.path)


def find_nifti(root_dir: str | None) -> list[NiftiSource]:
    """All NIfTI files below a folder, in a stable order.

    Raises:
        ConfigurationError: no folder was named, or it does not exist.
        InputError: it holds no NIfTI, or two files of one name.
    """
    hint = "point dataset.root_dir at a folder of .nii.gz files, or use dataset=phantom"
    if not root_dir:
        raise ConfigurationError(f"dataset=nifti needs a folder: {hint}")
    root = Path(root_dir).expanduser()
    if not root.is_dir():
        raise ConfigurationError(f"{root}: no such folder: {hint}")
    sources = [NiftiSource(path) for path in sorted(root.rglob("*")) if path.name.endswith((".nii", ".nii.gz"))]
    if not sources:
        raise InputError(f"{root}: holds no .nii or .nii.gz file: {hint}")
    names = [source.name for source in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{root}: several files are called {twice[0]}: give each patient a name of its own")
    return sources


@dataclass(frozen=True)
class PreparedVolume:
    """A cached volume, standard axes, int16 HU, ready to be cropped without reading the rest.

    Attributes:
        name: of its source.
        path: the ``.npy`` file, (D, H, W).
        affine: (4, 4) index (d, h, w, 1) -> RAS+ mm.
    """

    name: str
    path: Path
    affine: np.ndarray

    def open(self) -> np.ndarray:
        """Memory-map the voxels: (D, H, W) int16.

        Raises:
            InputError: the cached file is damaged.
        """
        try:
            voxels = np.load(self.path, mmap_mode="r")
            if voxels.dtype != np.int16 or voxels.ndim != 3:
                raise ValueError(f"{voxels.dtype} {voxels.shape} instead of int16 (D, H, W)")
            if voxels.offset + voxels.nbytes != self.path.stat().st_size:
                raise ValueError("its length does not fit its shape")
            return voxels
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{self.path}: cached volume of {self.name} is damaged, delete it ({error})") from error


def default_cache() -> Path:
    """Folder for prepared volumes of this user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xray2ctpa"


def prepare(source: VolumeSource, size_dhw: Size | None, cache: Path) -> PreparedVolume:
    """Load a volume and cache it, resampled whole (never cropped) to ``size_dhw``, or on its own grid for None.

    Raises:
        InputError: the source cannot be read.
        StorageError: the cache cannot be written.
    """
    key = f"{PREPARATION_VERSION} {source.identity} {size_dhw}"
    stem = cache / f"{source.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    voxels, record = stem.with_name(stem.name + ".npy"), stem.with_name(stem.name + ".json")
    if not (voxels.exists() and record.exists()):
        volume = source.load()
        hu, affine = volume.hu, volume.affine
        if size_dhw is not None and hu.shape != tuple(size_dhw):
            resampled, affine = resample_to_size(hu, affine, size_dhw)
            hu, _, _ = to_int16_hu(resampled)
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{cache}: cannot be created ({error.strerror}): set dataset.cache_dir") from error
        with atomic_write(record) as handle:
            handle.write(json.dumps({"name": source.name, "affine": affine.tolist()}).encode())
        with atomic_write(voxels) as handle:
            np.save(handle, np.ascontiguousarray(hu))
    try:
        affine = np.array(json.loads(record.read_text())["affine"], dtype=np.float64).reshape(4, 4)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{record}: cached record of {source.name} is damaged, delete it ({error})") from error
    return PreparedVolume(source.name, voxels, affine)


def prepare_all(
    sources: Sequence[VolumeSource], size_dhw: Size | None, cache: Path, what: str
) -> tuple[list[PreparedVolume], dict[str, str]]:
    """Prepare volumes; one that cannot be read never stops the rest.

    Returns:
        The prepared volumes, and a reason for each that failed, by name.
    """
    prepared, failed = [], {}
    for source in tqdm(sources, desc=f"preparing {what}", unit="volume", disable=not sys.stderr.isatty()):
        try:
            prepared.append(prepare(source, size_dhw, cache))
        except InputError as error:
            failed[source.name] = str(error)
    return prepared, failed


def manifest(sources: Sequence[VolumeSource]) -> str:
    """A short hash of the names in a cohort; a resumed run must see the same."""
    return hashlib.sha256("\n".join(sorted(source.name for source in sources)).encode()).hexdigest()[:16]
