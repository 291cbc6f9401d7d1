"""Finite scalar quantisation: the default quantizer; no codebook to learn, all codes kept in use by their entropy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from errors import ConfigurationError
from vq_gan_3d.distributed import all_reduce_mean
from vq_gan_3d.quantizer import Quantized, Quantizer, flatten_channels, squash, unflatten_channels

SOFTNESS = 2.0  # of the soft assignment: exp(-2 d²) for a vector d bins away
SAMPLED_CELLS = 4096  # of each volume, whose code use is taken


@lru_cache(maxsize=16)
def sampled_cells(cells: int) -> Tensor:
    """Which cells of a volume of ``cells`` cells are taken for its code use: (n,) int64, n at most `SAMPLED_CELLS`.

    Random, since every n-th cell of a grid falls on few of its planes; a function of the size alone, so that neither
    the batch nor its spread over processes decides what is seen of a volume.
    """
    if cells <= SAMPLED_CELLS:
        return torch.arange(cells)
    return torch.randperm(cells, generator=torch.Generator().manual_seed(0))[:SAMPLED_CELLS].sort().values


class FSQ(Quantizer):
    """Finite scalar quantisation: each channel is bounded and rounded; the codebook is the grid of all roundings.

    Mentzer et al. 2023, https://arxiv.org/abs/2309.15505, section 3 and appendix A.1. No codebook to learn; the loss is
    the missing entropy of code use over the batch (Yu et al. 2023, https://arxiv.org/abs/2310.05737, equation 4, its
    second term): whitening makes the channels uncorrelated, not independent, and corners of the grid stay empty.

    Args:
        levels: levels of each channel; their product is the number of codes.
        entropy_weight: weight of the missing entropy, in nats.
    """

    levels: Tensor
    strides: Tensor

    def __init__(self, levels: Sequence[int], entropy_weight: float = 0.0) -> None:
        if any(level < 2 for level in levels):
            raise ConfigurationError(f"model.fsq_levels={list(levels)}: every channel needs at least 2 levels")
        sizes = torch.tensor(list(levels))
        super().__init__(int(sizes.prod()), len(levels))
        self._sizes = list(levels)  # as numbers: a tensor on a GPU would be waited for
        self.entropy_weight = entropy_weight
        self.register_buffer("levels", sizes, persistent=False)
        self.register_buffer("strides", torch.cat([torch.ones(1, dtype=torch.int64), sizes[:-1].cumprod(0)]), False)

    def _bound(self, vectors: Tensor) -> Tensor:
        """(N, C) -> (N, C), each channel squeezed into (-0.5, level - 0.5): rounding gives 0 ... level-1."""
        return (0.5 * squash(vectors) + 0.5) * self.levels - 0.5  # bins of equal width, for odd and even levels alike

    def _soft_use(self, bounded: Tensor, first: int, last: int) -> Tensor:
        """Soft assignment of (n, C) to the joint levels of channels ``first`` ... ``last - 1``: (n, product)."""
        use = bounded.new_ones(len(bounded), 1)
        for channel in range(first, last):
            levels = torch.arange(self._sizes[channel], device=bounded.device)
            soft = torch.softmax(-SOFTNESS * (bounded[:, channel, None] - levels).square(), dim=1)  # (n, level)
            use = (soft[:, :, None] * use[:, None, :]).flatten(1)  # (n, codes so far)
        return use

    def _missing_entropy(self, bounded: Tensor, volumes: int) -> Tensor:
        """Log K minus the entropy of soft code use over the global batch of volumes, in nats: (N, C) -> scalar."""
        cells = sampled_cells(len(bounded) // volumes).to(bounded.device)
        part = bounded.unflatten(0, (volumes, -1)).index_select(1, cells).flatten(0, 1)  # (n, C)
        half = part.shape[1] // 2
        # a product of two halves: the code use of each vector by itself would take n x K floats, and most of the time
        joint = self._soft_use(part, 0, half).T @ self._soft_use(part, half, part.shape[1])
        mean = joint.flatten() / len(part)  # (K,)
        # DDP averages gradients: each rank lets its own share through, at the place that all ranks agree on
        mean = mean + (all_reduce_mean(mean.detach().clone()) - mean.detach())
        # floored: a code far from all of a batch underflows to 0, where the logarithm's gradient is NaN
        return math.log(self.n_codes) + (mean * mean.clamp_min(1e-20).log()).sum()

    def _to_codes(self, digits: Tensor) -> Tensor:
        """Digits 0 ... level-1 -> codes in [-1, 1]."""
        return digits / (0.5 * (self.levels - 1)) - 1

    def lookup(self, indices: Tensor) -> Tensor:
        """See :meth:`Quantizer.lookup`."""
        digits = indices[..., None].div(self.strides, rounding_mode="floor") % self.levels
        return self._to_codes(digits.float())

    def forward(self, z: Tensor) -> Quantized:
        """See :meth:`Quantizer.forward`."""
        with torch.autocast(z.device.type, enabled=False):
            bounded = self._bound(flatten_channels(z))  # (N, C)
            digits = torch.minimum(bounded.detach().round().clamp_min(0), self.levels - 1)
            indices = (digits.long() * self.strides).sum(1)  # (N,)
            codes = self._to_codes(bounded + (digits - bounded).detach())  # (N, C)
            train_use = self.training and self.entropy_weight > 0
            loss = self.entropy_weight * self._missing_entropy(bounded, len(z)) if train_use else bounded.new_zeros(())
            return Quantized(unflatten_channels(codes, z), indices.view(z.shape[0], *z.shape[2:]), loss)
