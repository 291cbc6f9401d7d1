"""Samples of the diffusion model: a latent, and what is known of its patient."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from dataset.geometry import affine_after_crop, crop_or_pad
from dataset.patch_sampling import random_start
from dataset.prepared import PreparedVolume
from dataset.projection import View
from dataset.ray_grid import ray_grid, rendered_info
from dataset.volume_dataset import first_readable
from dataset.xray import load_xray
from dataset.xray_augment import XRayAugmentation, augment_xray, augmentation_generator
from ddpm.conditions import UNKNOWN_LABEL, ConditionBatch, positions
from vq_gan_3d.latent_files import LatentFile
from vq_gan_3d.latents import LatentScaler

Triple = tuple[int, int, int]
# Standard X-rays and their rays that a worker keeps: decoding takes longer than a small training step.
CACHE_BYTES = 1 << 28


@dataclass(frozen=True)
class LatentCase:
    """A patient of the training set.

    Attributes:
        volume: prepared.
        latent: of that volume.
        xrays: for each view the radiographs to choose from; empty where there is none.
        label: 0, 1 or `UNKNOWN_LABEL`.
        text: report, "" where there is none.
    """

    volume: PreparedVolume
    latent: LatentFile
    xrays: tuple[tuple[Path, ...], ...]
    label: int = UNKNOWN_LABEL
    text: str = ""

    @property
    def name(self) -> str:
        """Of the volume."""
        return self.volume.name


@dataclass(frozen=True)
class LatentSettings:
    """What a sample holds.

    Attributes:
        views: of the X-rays, in the order of the conditioner.
        xray_size: side of a standard radiograph in pixels.
        crop_dhw: cells of a random crop; None for the whole field.
        context_dhw: cells of the low-resolution context that comes with crops.
        augmentation: of training X-rays; None for none. It must not move a picture away from its rays.
        tissue_bias: share of crops that are centred in the body.
        seed: of crops, choices and augmentation.
    """

    views: tuple[View, ...]
    xray_size: int
    crop_dhw: Triple | None = None
    context_dhw: Triple | None = None
    augmentation: XRayAugmentation | None = None
    tissue_bias: float = 0.0
    seed: int = 0


class LatentDataset(Dataset[dict[str, Any]]):
    """Map-style dataset of latents with conditions; a sample depends on (seed, epoch, index) alone.

    Args:
        cases: of one split.
        settings: what a sample holds.
        scaler: code -> latent, for the context.
        training: random crops, choice of X-ray and augmentation; else the centre, the first one and none, and the
            volume itself comes along.
        crops_per_volume: samples drawn from each volume in an epoch.
    """

    def __init__(
        self,
        cases: Sequence[LatentCase],
        settings: LatentSettings,
        scaler: LatentScaler,
        *,
        training: bool,
        crops_per_volume: int = 1,
    ) -> None:
        self.cases = list(cases)
        self.volumes = [case.volume for case in cases]
        self.settings = settings
        self.scaler = scaler
        self.training = training
        self.crops_per_volume = crops_per_volume
        self._xrays: OrderedDict[tuple[int, Path], tuple[Tensor, Tensor]] = OrderedDict()
        self._contexts: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.cases) * self.crops_per_volume

    def __getitem__(self, key: tuple[int, int] | int) -> dict[str, Any]:
        """One sample for (epoch, index), or for a plain index in epoch 0.

        A case that cannot be read is replaced by the next one and named in ``skipped``.

        Returns:
            ``code`` float32 (C, d, h, w); ``xray`` (V, 1, S, S), ``xray_present`` (V,), ``ray_grid`` (V, d, h, w, 2);
            ``label``, ``text``; of a crop ``extra``, its positions (3, d, h, w) or with a context (3 + C, d, h, w);
            ``affine`` (4, 4) of the sample's voxels, ``name``, ``skipped``; outside training ``hu`` int16 (1, D, H, W).
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        return first_readable(self.volumes, index, lambda number: self._sample(number, epoch, index))

    def _sample(self, number: int, epoch: int, index: int) -> dict[str, Any]:
        case, s = self.cases[number], self.settings
        rng = np.random.default_rng((s.seed, epoch, index))
        field = case.latent.shape[1:]
        start, size = (0, 0, 0), field
        if s.crop_dhw is not None:
            size = s.crop_dhw
            start = self._start(case, rng)
        code = case.latent.code(
            [max(0, at) for at in start], [min(n, have) for n, have in zip(size, field, strict=True)]
        )
        stride = case.latent.meta["stride_dhw"]
        sample = {
            "code": _pad(code, size),
            "label": torch.tensor(case.label),
            "text": case.text,
            **self._xrays_of(number, start, size, rng, epoch, index),
        }
        if s.crop_dhw is not None:
            place = positions(field, start, size)
            context = [] if s.context_dhw is None else [self._context(number, start, size)]
            sample["extra"] = torch.cat([place, *context])
        begin = [at * step for at, step in zip(start, stride, strict=True)]
        if self.training:
            return sample | {"affine": torch.from_numpy(affine_after_crop(case.latent.affine, begin))}
        voxels = [n * step for n, step in zip(size, stride, strict=True)]
        volume = cast(np.ndarray, case.volume.open())  # it slices as an array does
        crop, affine = crop_or_pad(volume, case.volume.affine, voxels, begin)
        hu = torch.from_numpy(np.ascontiguousarray(crop))[None]
        return sample | {"hu": hu, "affine": torch.from_numpy(np.asarray(affine, dtype=np.float64))}

    def _start(self, case: LatentCase, rng: np.random.Generator) -> tuple[int, int, int]:
        """First cell of a crop; a field smaller than the crop is padded at its far ends."""
        field, crop = case.latent.shape[1:], self.settings.crop_dhw
        assert crop is not None
        if not self.training:
            d, h, w = (max(0, (have - n) // 2) for have, n in zip(field, crop, strict=True))
            return d, h, w
        stride = case.latent.meta["stride_dhw"]
        voxels = [n * step for n, step in zip(field, stride, strict=True)]
        patch = [n * step for n, step in zip(crop, stride, strict=True)]
        places = random_start(voxels, patch, rng, case.volume.body, self.settings.tissue_bias)
        d, h, w = (max(0, at) // step for at, step in zip(places, stride, strict=True))
        return d, h, w

    def _xrays_of(
        self, number: int, start: Triple, size: Sequence[int], rng: np.random.Generator, epoch: int, index: int
    ) -> dict[str, Tensor]:
        """Pictures and rays of all views, one of several pictures drawn anew for each epoch."""
        s, case = self.settings, self.cases[number]
        images, grids, present = [], [], []
        for view, pictures in zip(s.views, case.xrays, strict=True):
            choice = int(rng.integers(len(pictures))) if self.training and len(pictures) > 1 else 0
            if not pictures:
                images.append(torch.zeros(1, s.xray_size, s.xray_size))
                grids.append(torch.full((*size, 2), 2.0))  # outside the picture
                present.append(False)
                continue
            image, grid = self._xray(number, pictures[choice], view)
            if self.training and s.augmentation is not None:
                image, grid = augment_xray(image, grid, augmentation_generator(s.seed, epoch, index), s.augmentation)
            part = tuple(slice(at, at + n) for at, n in zip(start, size, strict=True))
            images.append(image)
            grids.append(_pad(grid[part].movedim(-1, 0), size).movedim(0, -1))
            present.append(True)
        return {
            "xray": torch.stack(images),
            "xray_present": torch.tensor(present),
            "ray_grid": torch.stack(grids),
        }

    def _xray(self, number: int, path: Path, view: View) -> tuple[Tensor, Tensor]:
        """Standard picture (1, S, S) and rays (d, h, w, 2) of the whole field."""
        key = (number, path)
        if key not in self._xrays:
            latent = self.cases[number].latent
            xray = load_xray(path, self.settings.xray_size, view=view)
            info = rendered_info(xray)
            geometry = info.geometry if info is not None else None
            grid = ray_grid(geometry, view, xray, latent.affine, latent.shape_dhw, latent.meta["stride_dhw"])
            self._xrays[key] = (xray.image, torch.from_numpy(grid))
            if len(self._xrays) * (xray.image.nbytes + grid.nbytes) > CACHE_BYTES:
                self._xrays.popitem(last=False)
            return xray.image, torch.from_numpy(grid)
        return self._xrays[key]

    def _context(self, number: int, start: Triple, size: Sequence[int]) -> Tensor:
        """Low-resolution latent of the whole field, seen from a crop: (C, d, h, w)."""
        if number not in self._contexts:
            assert self.settings.context_dhw is not None
            latent = self.scaler.to_latent(self.cases[number].latent.code())
            self._contexts[number] = F.adaptive_avg_pool3d(latent[None], self.settings.context_dhw)[0]
        return context_at(self._contexts[number], self.cases[number].latent.shape[1:], start, size)


def _pad(x: Tensor, size: Sequence[int]) -> Tensor:
    """Repeat the far ends of (C, d, h, w) until it has ``size``: beyond a volume lies more of what is at its edge."""
    d, h, w = (n - have for n, have in zip(size, x.shape[1:], strict=True))
    return F.pad(x[None], (0, w, 0, h, 0, d), mode="replicate")[0] if d or h or w else x


def context_at(context: Tensor, field: Sequence[int], start: Sequence[int], size: Sequence[int]) -> Tensor:
    """The low-resolution latent of a whole field on the cells of a crop, trilinear.

    In training the context is the true latent, averaged over blocks. A cascade samples it first, with a model of whole
    fields at this resolution, and then the crops of the full resolution around it.

    Shapes: context (C, a, b, c), field, start and size in cells of the full resolution -> (C, d, h, w).
    """
    grid = positions(field, start, size).flip(0).movedim(0, -1)  # (d, h, w, 3) as (w, h, d)
    return F.grid_sample(context[None], grid[None].to(context.dtype), padding_mode="border", align_corners=False)[0]


def collate_latents(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Batch samples of `LatentDataset`: tensors are stacked, ``text`` and ``name`` are lists, ``skipped`` is joined."""
    batch: dict[str, Any] = {
        key: torch.stack([sample[key] for sample in samples])
        for key, value in samples[0].items()
        if isinstance(value, Tensor)
    }
    batch |= {key: [sample[key] for sample in samples] for key in ("text", "name")}
    return batch | {"skipped": [entry for sample in samples for entry in sample["skipped"]]}


def condition_batch(batch: Mapping[str, Any]) -> ConditionBatch:
    """The conditions in a collated batch."""
    return ConditionBatch(
        batch["xray"],
        batch["xray_present"],
        batch["ray_grid"],
        batch["label"],
        tuple(batch["text"]),
        batch.get("extra"),
    )
