"""Prepared volumes as training samples: whole, or patches at keyed random places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import Dataset

from dataset.geometry import crop_or_pad
from dataset.patch_sampling import random_start
from dataset.prepared import PreparedVolume
from dataset.sources import Size
from errors import InputError, ProjectError


class VolumeDataset(Dataset[dict[str, Any]]):
    """Map-style dataset of int16 HU patches.

    What a sample holds depends on (seed, epoch, index) alone: not on workers, ranks, or where a run was resumed.

    Args:
        volumes: prepared volumes.
        patch_dhw: size of a patch; None gives whole volumes.
        random: random patch positions (training) instead of the centre (validation).
        patches_per_volume: samples drawn from each volume in an epoch.
        seed: of the positions.
        tissue_bias: share of random patches that are centred in the body, in [0, 1].
    """

    def __init__(
        self,
        volumes: Sequence[PreparedVolume],
        patch_dhw: Size | None,
        *,
        random: bool,
        patches_per_volume: int = 1,
        seed: int = 0,
        tissue_bias: float = 0.0,
    ) -> None:
        self.volumes = list(volumes)
        self.patch_dhw = patch_dhw
        self.random = random
        self.patches_per_volume = patches_per_volume
        self.seed = seed
        self.tissue_bias = tissue_bias

    def __len__(self) -> int:
        return len(self.volumes) * self.patches_per_volume

    def __getitem__(self, key: tuple[int, int] | int) -> dict[str, Any]:
        """One sample for (epoch, index), or for a plain index in epoch 0.

        A volume that cannot be read is replaced by the next one and named in ``skipped``.

        Returns:
            ``hu`` int16 (1, D, H, W), ``affine`` (4, 4) float64, ``name``, ``skipped`` [(name, reason)].
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        skipped: list[tuple[str, str]] = []
        for attempt in range(len(self.volumes)):
            volume = self.volumes[(index + attempt) % len(self.volumes)]
            try:
                return self._sample(volume, epoch, index) | {"skipped": skipped}
            except InputError as error:
                skipped.append((volume.name, str(error)))
            except (ProjectError, MemoryError):
                raise
            except Exception as error:  # not what reading may raise: no skip, but the sample must be named
                raise InputError(f"{volume.path}: {volume.name} failed ({type(error).__name__}: {error})") from error
        raise InputError(f"none of {len(self.volumes)} volumes can be read; the last: {skipped[-1][1]}")

    def _sample(self, volume: PreparedVolume, epoch: int, index: int) -> dict[str, Any]:
        hu, affine = volume.open(), volume.affine
        if self.patch_dhw is not None:
            start = None  # centred
            if self.random:
                rng = np.random.default_rng((self.seed, epoch, index))
                start = random_start(hu.shape, self.patch_dhw, rng, volume.body, self.tissue_bias)
            crop, affine = crop_or_pad(
                cast(np.ndarray, hu), affine, self.patch_dhw, start
            )  # it slices as an array does
        else:
            crop = np.asarray(hu)
        return {"hu": torch.from_numpy(crop[None]), "affine": affine, "name": volume.name}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Batch samples: ``hu`` int16 (B, 1, D, H, W), ``affine`` (B, 4, 4), ``name`` [B], ``skipped`` of all samples."""
    return {
        "hu": torch.stack([sample["hu"] for sample in samples]),
        "affine": torch.from_numpy(np.stack([sample["affine"] for sample in samples])),
        "name": [sample["name"] for sample in samples],
        "skipped": [entry for sample in samples for entry in sample["skipped"]],
    }
