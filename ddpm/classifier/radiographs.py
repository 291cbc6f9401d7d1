"""Standard frontal radiographs of a cohort as training data of the 2D classifier: what the radiograph alone knows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from dataset.data_module import VolumeDataModule
from dataset.on_volumes import OnVolumesDataModule
from dataset.prepared import PreparedVolume
from dataset.sampler import ResumableSampler
from dataset.sources import VolumeSource
from dataset.volume_dataset import first_readable
from dataset.xray import load_xray
from ddpm.prepare import radiographs_of
from errors import InputError

FOLDER = "xrays"  # of rendered pictures in the cache, the same as the diffusion model's


def frontal_of(source: VolumeSource, volume: PreparedVolume, cache: Path) -> Path:
    """The first frontal radiograph of a case: its own, else the one rendered from the CT.

    Raises:
        InputError: it has none (only lateral ones), or it or the volume is damaged.
        StorageError: the cache cannot be written.
    """
    (pictures,) = radiographs_of(source, volume, ("frontal",), cache / FOLDER)
    if not pictures:
        raise InputError(f"{volume.name}: no frontal radiograph: add one, or leave the case out")
    return pictures[0]


class RadiographDataset(Dataset[dict[str, Any]]):
    """Map-style dataset of standard radiographs, one for each volume.

    Args:
        volumes: prepared.
        pictures: their radiographs, in the same order.
        size: side of a standard radiograph in pixels.
    """

    def __init__(self, volumes: Sequence[PreparedVolume], pictures: Sequence[Path], size: int) -> None:
        self.volumes = list(volumes)
        self.pictures = list(pictures)
        self.size = size

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, key: tuple[int, int] | int) -> dict[str, Any]:
        """One sample for (epoch, index) or a plain index: ``xray`` float32 (1, S, S), ``name``, ``skipped``.

        A picture that cannot be read is replaced by the next one and named in ``skipped``.
        """
        index = key[1] if isinstance(key, tuple) else key
        return first_readable(
            self.volumes,
            index,
            lambda number: {"xray": load_xray(self.pictures[number], self.size, view="frontal").image},
        )


def collate_radiographs(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Batch samples: ``xray`` (B, 1, S, S), ``name`` [B], ``skipped`` of all samples."""
    return {
        "xray": torch.stack([sample["xray"] for sample in samples]),
        "name": [sample["name"] for sample in samples],
        "skipped": [entry for sample in samples for entry in sample["skipped"]],
    }


class RadiographDataModule(OnVolumesDataModule):
    """Radiographs split by patient as `VolumeDataModule` splits volumes, which it holds and prepares.

    Args:
        volumes: the cohort.
        size: side of a standard radiograph in pixels.
    """

    def __init__(self, volumes: VolumeDataModule, size: int) -> None:
        super().__init__(volumes)
        self.size = size
        self.datasets: dict[str, RadiographDataset] = {}

    def build(self, rank: int, world_size: int) -> ResumableSampler:
        """Prepare volumes and radiographs, and the training order; caches make it cheap the second time.

        Raises:
            InputError: too many cases cannot be prepared.
            ConfigurationError: fewer training cases than one global batch.
        """
        v = self.volumes
        v.build(rank, world_size)
        for split, dataset in v.datasets.items():
            by_name = {source.name: source for source in v.sources[split]}
            pictures, failed = {}, {}
            for volume in dataset.volumes:
                try:
                    pictures[volume.name] = frontal_of(by_name[volume.name], volume, v.cache)
                except InputError as error:
                    failed[volume.name] = str(error)
            v.bad.update(failed)
            if not pictures or len(failed) > v.max_bad_fraction * len(dataset.volumes):
                raise InputError(
                    f"{len(failed)} of {len(dataset.volumes)} {split} radiographs cannot be prepared, more than "
                    f"dataset.max_bad_fraction={v.max_bad_fraction}; the first: {next(iter(failed.values()))}"
                )
            kept = [volume for volume in dataset.volumes if volume.name in pictures]
            self.datasets[split] = RadiographDataset(kept, list(pictures.values()), self.size)
        return self.take_over(self.datasets, collate_radiographs, rank, world_size)
