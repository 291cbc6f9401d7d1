"""What a training run needs of each patient, made on first use: the latent of the volume and its radiographs."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dataset.drr import rendered_xray
from dataset.pairs_case import CTCase, volume_stem
from dataset.phantom import sample_patient
from dataset.prepared import PreparedVolume, one_maker, short_hash
from dataset.projection import View
from dataset.sources import PhantomSource, VolumeSource
from dataset.store import open_store
from dataset.xray import view_of
from ddpm.conditions import UNKNOWN_LABEL
from ddpm.latent_dataset import LatentCase
from errors import ConfigurationError, InputError
from vq_gan_3d.latent_files import SUFFIX, LatentFile, open_latent, write_latent
from vq_gan_3d.latents import FrozenCodec

log = logging.getLogger(__name__)


class LatentLibrary:
    """Where the latents of a cohort are: a folder of ``preprocess/encode_latents.py``, or a cache that fills itself.

    Args:
        codec: whose latents.
        folder: of encoded latents; None for the cache.
        cache: folder of caches.

    Raises:
        ConfigurationError: no such folder.
        InputError: two latents of one name in it.
    """

    def __init__(self, codec: FrozenCodec, folder: Path | None, cache: Path) -> None:
        self.codec = codec
        self.folder = folder
        self.cache = cache / "latents" / codec.content_hash[:16]
        self._by_stem: dict[str, Path] = {}
        if folder is None:
            return
        if not folder.is_dir():
            raise ConfigurationError(f"{folder}: no such folder: make it with preprocess/encode_latents.py")
        for path in sorted(folder.rglob(f"*{SUFFIX}")):
            if path.stem in self._by_stem:
                raise InputError(f"{path}: {self._by_stem[path.stem]} has the same name: give each volume its own")
            self._by_stem[path.stem] = path

    def find(self, source: VolumeSource, volume: PreparedVolume, *, verify: bool) -> LatentFile:
        """The latent of a prepared volume; the cache encodes what it lacks.

        Args:
            source: of the volume.
            volume: prepared.
            verify: read it to the last number; a second process need not.

        Raises:
            InputError: missing in the folder, damaged, of another codec, window or grid.
            StorageError: the cache cannot be written.
        """
        if self.folder is not None:
            stem = volume_stem(source.ct) if isinstance(source, CTCase) else source.name
            path = self._by_stem.get(stem)
            if path is None:
                raise InputError(
                    f"{self.folder}: no latent of {stem}: run preprocess/encode_latents.py, or leave "
                    "dataset.latents_dir to have latents made"
                )
            latent = open_latent(path).require(self.codec)
            shape, affine = tuple(volume.open().shape), np.asarray(volume.affine)
            if latent.shape_dhw != shape or not np.allclose(latent.affine, affine, atol=1e-3):
                raise InputError(
                    f"{path}: latent of a volume of {list(latent.shape_dhw)} voxels [D, H, W], training wants "
                    f"{list(shape)}, or they lie elsewhere: encode it again with the --size of dataset.size"
                )
            return latent.verify() if verify else latent
        key = f"{open_store(volume.path).checksum} {np.asarray(volume.affine).tobytes().hex()}"
        path = self.cache / f"{volume.name}-{short_hash(key)}{SUFFIX}"
        with one_maker(path):
            if path.exists():
                try:
                    latent = open_latent(path).require(self.codec)
                    return latent.verify() if verify else latent
                except InputError as error:
                    log.warning("%s; cached latent, made again from its volume", error)
            hu = volume.open()
            code = self.codec.encode(hu)
            return write_latent(path, code, self.codec, volume.affine, hu.shape, source={"name": volume.name})


def label_of(source: VolumeSource) -> int:
    """1 for a pulmonary embolism, 0 for none, `UNKNOWN_LABEL` where nobody said."""
    if isinstance(source, PhantomSource):
        return int(sample_patient(source.seed).has_pe)
    label = getattr(source, "label", None)
    return UNKNOWN_LABEL if label is None else int(label)


def radiographs_of(
    source: VolumeSource, volume: PreparedVolume, views: Sequence[View], cache: Path
) -> tuple[tuple[Path, ...], ...]:
    """For each view all radiographs to choose from: the patient's own, else the one rendered from the CT.

    Real and rendered ones are not mixed for a patient.

    Raises:
        InputError: a radiograph or the volume is damaged.
        StorageError: the cache cannot be written.
    """
    if getattr(source, "needs_drr", True):
        return tuple((rendered_xray(volume, view, cache),) for view in views)
    own: dict[str, list[Path]] = {view: [] for view in views}
    for path in getattr(source, "xrays", ()):
        view = view_of(path)
        own.setdefault("frontal" if view == "unknown" else view, []).append(path)
    own["lateral"] = [*own.get("lateral", ()), *getattr(source, "laterals", ())]
    return tuple(tuple(own[view]) for view in views)


def prepare_cases(
    sources: Sequence[VolumeSource],
    volumes: Sequence[PreparedVolume],
    library: LatentLibrary,
    views: Sequence[View],
    cache: Path,
    what: str,
) -> tuple[list[LatentCase], dict[str, str]]:
    """Latent, radiographs, label and report of each prepared volume; one that fails never stops the rest.

    Returns:
        The cases, and a reason for each that failed, by name.
    """
    by_name = {source.name: source for source in sources}
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    cases, failed = [], {}
    for volume in tqdm(volumes, desc=f"latents of {what}", unit="volume", disable=not sys.stderr.isatty()):
        source = by_name[volume.name]
        try:
            latent = library.find(source, volume, verify=first)
            xrays = radiographs_of(source, volume, views, cache / "xrays")
        except InputError as error:
            failed[volume.name] = str(error)
            continue
        cases.append(LatentCase(volume, latent, xrays, label_of(source), getattr(source, "report", None) or ""))
    return cases, failed


def encoding_device(accelerator: str) -> torch.device:
    """Where latents are made: on a GPU if the run uses any."""
    return torch.device("cuda" if accelerator == "cuda" and torch.cuda.is_available() else "cpu")
