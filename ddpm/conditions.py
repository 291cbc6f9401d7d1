"""What a patient brings to the diffusion model, and what the U-Net takes of it: two plain containers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Embolism label of a condition: nobody said, or the label was dropped for guidance.
UNKNOWN_LABEL = 2


@dataclass(frozen=True)
class ConditionBatch:
    """Raw conditions of B patients with V views (frontal first, then lateral).

    Attributes:
        xray: (B, V, 1, S, S) float32 in [0, 1], standard radiographs (`dataset.xray`); zeros where absent.
        xray_present: (B, V) bool.
        ray_grid: (B, V, d, h, w, 2) float32: where the centre of each latent cell is projected, as (x, y) of ``xray``
            in [-1, 1] for ``grid_sample(align_corners=False)``; beyond that range the cell is outside the picture.
        label: (B,) int64: 0 no embolism, 1 embolism, `UNKNOWN_LABEL`.
        text: B reports, "" where there is none.
        extra: (B, E, d, h, w): channels that are joined to the noisy latent as they are and never dropped: position
            in the whole field and, for crops, its low-resolution context. None: whole fields, of which the positions
            are known.
    """

    xray: Tensor
    xray_present: Tensor
    ray_grid: Tensor
    label: Tensor
    text: tuple[str, ...]
    extra: Tensor | None = None


@dataclass(frozen=True)
class Conditions:
    """Encoded conditions of B patients, as the U-Net takes them; what is None is switched off.

    Attributes:
        lifted: for each resolution of the U-Net, fine to coarse, (B, C, d, h, w): X-ray features spread along their
            rays, joined to the features of that resolution.
        tokens: (B, N, C) for cross-attention.
        vector: (B, C), added to the time embedding.
        extra: (B, E, d, h, w), joined to the noisy latent.
    """

    lifted: tuple[Tensor, ...] | None = None
    tokens: Tensor | None = None
    vector: Tensor | None = None
    extra: Tensor | None = None


def positions(field: Sequence[int], start: Sequence[int], size: Sequence[int]) -> Tensor:
    """Where the cells of a crop are in the whole field: (3, d, h, w), each of d, h, w from -1 to 1 at its edges."""
    axes = [
        (2 * (torch.arange(n, dtype=torch.float32) + at) + 1) / have - 1
        for have, at, n in zip(field, start, size, strict=True)
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))
