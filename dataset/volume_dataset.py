"""Prepared volumes as samples: whole, patches at keyed random places, or the tiles that cover them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import Dataset

from dataset.geometry import crop_or_pad
from dataset.patch_sampling import random_start
from dataset.prepared import PreparedVolume
from dataset.sources import Size
from dataset.tiling import Tiling
from errors import InputError, ProjectError
from params import HU_AIR

TILE_OVERLAP = 0.25
# Tile starts are multiples of this where the tile's size allows it, so that they fall on cells of any codec of stride
# 4 or 8, and the halves of overlaps on cells of stride 4.
TILE_STEP_VOX = 8


def first_readable(
    volumes: Sequence[PreparedVolume], index: int, read: Callable[[int], dict[str, Any]]
) -> dict[str, Any]:
    """The sample of a volume, or of the next one that can be read.

    Args:
        volumes: all there are.
        index: of the wanted one; it wraps around.
        read: number of a volume -> sample.

    Returns:
        The sample with ``name`` and ``skipped`` [(name, reason)].

    Raises:
        InputError: none can be read, or one failed in a way in which reading must not fail.
    """
    skipped: list[tuple[str, str]] = []
    for attempt in range(len(volumes)):
        number = (index + attempt) % len(volumes)
        volume = volumes[number]
        try:
            return read(number) | {"name": volume.name, "skipped": skipped}
        except InputError as error:
            skipped.append((volume.name, str(error)))
        except (ProjectError, MemoryError):
            raise
        except Exception as error:  # not what reading may raise: no skip, but the sample must be named
            raise InputError(f"{volume.path}: {volume.name} failed ({type(error).__name__}: {error})") from error
    raise InputError(f"none of {len(volumes)} volumes can be read; the last: {skipped[-1][1]}")


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
        overfit_patches: so many samples at most, the same in every epoch and as often as needed to fill it; None: all.
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
        overfit_patches: int | None = None,
    ) -> None:
        self.volumes = list(volumes)
        self.patch_dhw = patch_dhw
        self.random = random
        self.patches_per_volume = patches_per_volume
        self.seed = seed
        self.tissue_bias = tissue_bias
        self.overfit_patches = overfit_patches

    def __len__(self) -> int:
        return len(self.volumes) * self.patches_per_volume

    def __getitem__(self, key: tuple[int, int] | int) -> dict[str, Any]:
        """One sample for (epoch, index), or for a plain index in epoch 0.

        A volume that cannot be read is replaced by the next one and named in ``skipped``.

        Returns:
            ``hu`` int16 (1, D, H, W), ``affine`` (4, 4) float64, ``name``, ``skipped`` [(name, reason)].
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if self.overfit_patches is not None:
            epoch, index = 0, index % self.overfit_patches
        return first_readable(self.volumes, index, lambda number: self._sample(self.volumes[number], epoch, index))

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
        return {"hu": torch.from_numpy(crop[None]), "affine": affine}


class TileDataset(Dataset[dict[str, Any]]):
    """Map-style dataset of the tiles that cover volumes: 25 % overlap, as in reconstruction.

    Every voxel belongs to exactly one tile of its volume (overlaps are halved), so sums over tiles are sums over the
    volume. The central tile of a volume comes first, since it shows the most.

    Args:
        volumes: prepared volumes.
        patch_dhw: size of a tile; a smaller volume is padded with air at the far ends.
        limit: tiles of each volume, evenly spaced among all; None takes all.
    """

    def __init__(self, volumes: Sequence[PreparedVolume], patch_dhw: Size, *, limit: int | None = None) -> None:
        self.volumes = list(volumes)
        self.patch_dhw = patch_dhw
        self.tiles: list[tuple[int, Size]] = []
        self.tilings = [_tiling(volume.open().shape, patch_dhw) for volume in self.volumes]
        for number, tiling in enumerate(self.tilings):
            starts = list(tiling)
            if limit is not None and limit < len(starts):
                starts = [starts[(2 * i + 1) * len(starts) // (2 * limit)] for i in range(limit)]
            starts.sort(key=lambda start, tiling=tiling: _off_centre(start, tiling))  # type: ignore[misc]
            self.tiles += [(number, start) for start in starts]

    def __len__(self) -> int:
        return len(self.tiles)

    def of_volumes(self, numbers: Sequence[int]) -> list[int]:
        """Indices of the tiles of some volumes, volume by volume."""
        wanted = set(numbers)
        return [index for index, (number, _) in enumerate(self.tiles) if number in wanted]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One tile.

        Returns:
            As `VolumeDataset`, and ``start`` (3,) of the tile in the volume, ``shape`` (3,) of the volume and ``own``
            (3, 2): first and last + 1 of the tile's own voxels, in the tile. A tile that cannot be read is air, owns
            nothing and is named in ``skipped``.
        """
        number, start = self.tiles[index]
        volume, tiling = self.volumes[number], self.tilings[number]
        sample: dict[str, Any] = {"name": volume.name, "skipped": []}
        own = np.array([_own(tiling, axis, at) for axis, at in enumerate(start)])
        try:
            crop, affine = crop_or_pad(cast(np.ndarray, volume.open()), volume.affine, self.patch_dhw, start)
        except InputError as error:
            sample["skipped"] = [(volume.name, str(error))]
            crop, affine = np.full(self.patch_dhw, HU_AIR, np.int16), volume.affine
            own = np.zeros((3, 2), np.int64)
        geometry = {"start": torch.tensor(start), "shape": torch.tensor(tiling.shape_dhw), "own": torch.from_numpy(own)}
        return sample | {"hu": torch.from_numpy(crop[None]), "affine": affine} | geometry


def _tiling(shape: Sequence[int], patch_dhw: Size) -> Tiling:
    d, h, w = (math.gcd(size, TILE_STEP_VOX) for size in patch_dhw)
    return Tiling((shape[0], shape[1], shape[2]), patch_dhw, TILE_OVERLAP, (d, h, w))


def _off_centre(start: Size, tiling: Tiling) -> float:
    """Squared distance of a tile's centre from the volume's, in tiles."""
    sizes = zip(start, tiling.tile_dhw, tiling.shape_dhw, strict=True)
    return sum(((at + (tile - length) / 2) / tile) ** 2 for at, tile, length in sizes)


def _own(tiling: Tiling, axis: int, start: int) -> tuple[int, int]:
    """First and last + 1 of the voxels along an axis that the tile at ``start`` answers for, counted in the tile."""
    starts, tile, length = tiling.starts[axis], tiling.tile_dhw[axis], tiling.shape_dhw[axis]
    place = starts.index(start)
    first = 0 if place == 0 else (starts[place - 1] + tile + start) // 2
    last = length if place == len(starts) - 1 else (start + tile + starts[place + 1]) // 2
    return min(first, length) - start, min(last, length) - start


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Batch samples: ``hu`` int16 (B, 1, D, H, W), ``affine`` (B, 4, 4), ``name`` [B], ``skipped`` of all samples.

    Those of tiles also hold ``start`` (B, 3), ``shape`` (B, 3) and ``own`` (B, 3, 2).
    """
    geometry = [key for key in ("start", "shape", "own") if key in samples[0]]
    return {key: torch.stack([sample[key] for sample in samples]) for key in geometry} | {
        "hu": torch.stack([sample["hu"] for sample in samples]),
        "affine": torch.from_numpy(np.stack([sample["affine"] for sample in samples])),
        "name": [sample["name"] for sample in samples],
        "skipped": [entry for sample in samples for entry in sample["skipped"]],
    }
