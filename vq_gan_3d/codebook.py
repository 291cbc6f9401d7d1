"""Quantizers: EMA codebook, SimVQ and FSQ behind one small contract.

All look codes up in a low-dimensional space (a few channels; Yu et al. 2022, https://arxiv.org/abs/2110.04627), which
keeps every code in use and gives the diffusion model a compact latent. All expect whitened input (see ``code_norm``)
and squash it: codes spread evenly over the cube lie where the data is from the first step on, and a vector beyond the
last code cannot run away (its gradient would go on pushing it, the outliers would rule the whitening, and all others
would fall on a few codes: so SimVQ was left with 3 of 512 after 38 steps).

The arithmetic is fp32 whatever the autocast (fp16 sums over 131 k vectors overflow), in chunks (an N×K distance matrix
of a 1 M-voxel batch would take gigabytes).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import ConfigurationError
from vq_gan_3d.distributed import all_reduce_mean, all_reduce_sum, rank, world_size

CHUNK_VECTORS = 4096
SOFTNESS = 2.0  # of FSQ's soft assignment: exp(-2 d²) for a vector d bins away


class Quantized(NamedTuple):
    """What a quantizer returns.

    Attributes:
        codes: (B, C, D, H, W) quantised code in [-1, 1], float32, gradient straight through to the squashed input.
        indices: (B, D, H, W) int64 code numbers.
        loss: scalar, commitment and codebook terms; zero where the quantizer needs none.
    """

    codes: Tensor
    indices: Tensor
    loss: Tensor


@torch.no_grad()
def nearest_codes(vectors: Tensor, codebook: Tensor, chunk: int = CHUNK_VECTORS) -> Tensor:
    """Index of the nearest code in Euclidean distance; ties go to the lowest index.

    Shapes: vectors (N, C), codebook (K, C), both float32 -> (N,) int64. Memory above the inputs: chunk x K floats.
    """
    half_norms = 0.5 * codebook.square().sum(1)
    nearest = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    for start in range(0, len(vectors), chunk):
        part = vectors[start : start + chunk]
        # argmin |z - e|² = argmin |e|²/2 - z·e; addmm writes it in one pass
        scores = torch.addmm(half_norms, part, codebook.T, alpha=-1)
        torch.argmin(scores, dim=1, out=nearest[start : start + chunk])
    return nearest


def flatten_channels(z: Tensor) -> Tensor:
    """(B, C, D, H, W) -> (B*D*H*W, C) float32."""
    return z.permute(0, 2, 3, 4, 1).reshape(-1, z.shape[1]).float()


def unflatten_channels(vectors: Tensor, like: Tensor) -> Tensor:
    """(B*D*H*W, C) -> (B, C, D, H, W) with the grid of ``like``."""
    b, _, d, h, w = like.shape
    return vectors.reshape(b, d, h, w, -1).permute(0, 4, 1, 2, 3)


class Quantizer(nn.Module):
    """Contract of all quantizers.

    Attributes:
        n_codes: size K of the codebook.
        code_channels: channels C of the code space.
    """

    def __init__(self, n_codes: int, code_channels: int) -> None:
        super().__init__()
        self.n_codes = n_codes
        self.code_channels = code_channels

    def lookup(self, indices: Tensor) -> Tensor:
        """Code vectors of code numbers: (...) int64 -> (..., C) float32."""
        raise NotImplementedError

    def forward(self, z: Tensor) -> Quantized:
        """Quantise (B, C, D, H, W) of any float dtype."""
        raise NotImplementedError


def squash(z: Tensor) -> Tensor:
    """Whitened values -> (-1, 1); with a gain of 0.8 a standard normal comes out nearly uniform."""
    return torch.tanh(0.8 * z)


def even_codes(n_codes: int, code_channels: int) -> Tensor:
    """Codes (K, C) uniform in the cube, from a generator of their own: the same on every rank and for every seed."""
    return 2 * torch.rand(n_codes, code_channels, generator=torch.Generator().manual_seed(0)) - 1


def pick_vectors(vectors: Tensor, weights: Tensor, count: int) -> Tensor:
    """``count`` vectors of the global batch drawn by weight, those of other ranks as zeros: their sum is the pick.

    Every rank draws the same numbers (the trainer seeds each step alike on all ranks), so that two processes move a
    dead code to where one process with the same global batch would.

    Shapes: vectors (N, C), weights (N,) of at least 0 -> (count, C).
    """
    cumulative = weights.double().clamp_min(1e-12).cumsum(0)
    totals = torch.zeros(world_size(), dtype=torch.float64, device=vectors.device)
    totals[rank()] = cumulative[-1]
    totals = all_reduce_sum(totals)
    draws = torch.rand(count, dtype=torch.float64).to(vectors.device) * totals.sum() - totals[: rank()].sum()
    ours = (draws >= 0) & (draws < cumulative[-1])
    picks = torch.searchsorted(cumulative, draws, right=True).clamp_max(len(vectors) - 1)
    return torch.where(ours[:, None], vectors[picks], 0.0)


class EMACodebook(Quantizer):
    """Codebook that follows running means of the vectors assigned to it, with restart of dead codes.

    van den Oord et al. 2017, https://arxiv.org/abs/1711.00937, appendix A.1 (equations 6-8); restarts after Dhariwal
    et al. 2020, https://arxiv.org/abs/2005.00341. Statistics are summed over all ranks.

    Args:
        n_codes: K.
        code_channels: C.
        commitment_weight: β of the commitment loss.
        decay: γ of the running means.
        restart_below: a code whose running count falls under this share of the mean count is moved onto a vector of
            the present batch, drawn by its squared error (as k-means++ does, Arthur and Vassilvitskii 2007): drawn
            evenly it would be air nearly every time, where a code stands already.
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(
        self,
        n_codes: int,
        code_channels: int,
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        restart_below: float = 0.03,
    ) -> None:
        super().__init__(n_codes, code_channels)
        self.commitment_weight = commitment_weight
        self.decay = decay
        self.restart_below = restart_below
        codebook = even_codes(n_codes, code_channels)
        self.register_buffer("codebook", codebook)
        self.register_buffer("counts", torch.full((n_codes,), 0.01))  # light: the first batches may place it anew
        self.register_buffer("sums", 0.01 * codebook)

    def lookup(self, indices: Tensor) -> Tensor:
        """See :meth:`Quantizer.lookup`."""
        return F.embedding(indices, self.codebook)

    @torch.no_grad()
    def _follow(self, vectors: Tensor, indices: Tensor) -> None:
        """One step of the running means (in place) on vectors (N, C) assigned to ``indices`` (N,)."""
        counts = torch.bincount(indices, minlength=self.n_codes).float()
        sums = torch.zeros_like(self.sums).index_add_(0, indices, vectors)
        errors = (vectors - self.lookup(indices)).square().sum(1)
        candidates = pick_vectors(vectors, errors, self.n_codes)
        packed = all_reduce_sum(torch.cat([counts[:, None], sums, candidates], dim=1))
        if not bool(packed.isfinite().all()):  # asked of the sum, so all ranks agree not to follow this batch
            return
        counts, sums, candidates = packed.split([1, self.code_channels, self.code_channels], dim=1)
        counts = counts[:, 0]
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        alive_above = self.restart_below * self.counts.mean()
        dead = self.counts < alive_above
        # twice the limit: some ln 2 / (1 - decay) batches to prove itself, and light enough to move to its vectors
        self.sums.copy_(torch.where(dead[:, None], candidates * (2 * alive_above), self.sums))
        self.counts.copy_(torch.where(dead, 2 * alive_above, self.counts))
        self.codebook.copy_(self.sums / self.counts.clamp_min(1e-5)[:, None])

    def forward(self, z: Tensor) -> Quantized:
        """See :meth:`Quantizer.forward`; in training mode the codebook moves after the lookup."""
        with torch.autocast(z.device.type, enabled=False):
            vectors = squash(flatten_channels(z))  # (N, C)
            indices = nearest_codes(vectors.detach(), self.codebook)  # (N,)
            codes = self.lookup(indices)  # (N, C)
            if self.training:
                self._follow(vectors.detach(), indices)
            loss = self.commitment_weight * F.mse_loss(vectors, codes)
            codes = vectors + (codes - vectors).detach()
            return Quantized(unflatten_channels(codes, z), indices.view(z.shape[0], *z.shape[2:]), loss)


class SimVQ(Quantizer):
    """Frozen random codebook seen through one trained linear map: all codes move together, none dies.

    Zhu et al. 2024, https://arxiv.org/abs/2411.02038, equations 5-7. The map starts as the identity, which fits since
    the input is whitened and squashed: on unscaled input every vector falls on one code at once.

    Args:
        n_codes: K.
        code_channels: C.
        commitment_weight: β of the commitment loss.
    """

    frozen_codes: Tensor

    def __init__(self, n_codes: int, code_channels: int, commitment_weight: float = 0.25) -> None:
        super().__init__(n_codes, code_channels)
        self.commitment_weight = commitment_weight
        self.register_buffer("frozen_codes", even_codes(n_codes, code_channels))
        self.map = nn.Linear(code_channels, code_channels)
        with torch.no_grad():
            self.map.weight.copy_(torch.eye(code_channels))
            self.map.bias.zero_()

    def lookup(self, indices: Tensor) -> Tensor:
        """See :meth:`Quantizer.lookup`."""
        return F.linear(F.embedding(indices, self.frozen_codes), self.map.weight, self.map.bias)

    def forward(self, z: Tensor) -> Quantized:
        """See :meth:`Quantizer.forward`."""
        with torch.autocast(z.device.type, enabled=False):
            vectors = squash(flatten_channels(z))  # (N, C)
            codebook = F.linear(self.frozen_codes, self.map.weight, self.map.bias)  # (K, C)
            indices = nearest_codes(vectors.detach(), codebook.detach())  # (N,)
            codes = F.embedding(indices, codebook)  # (N, C)
            loss = F.mse_loss(codes, vectors.detach()) + self.commitment_weight * F.mse_loss(vectors, codes.detach())
            codes = vectors + (codes - vectors).detach()
            return Quantized(unflatten_channels(codes, z), indices.view(z.shape[0], *z.shape[2:]), loss)


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
        self.entropy_weight = entropy_weight
        self.register_buffer("levels", sizes, persistent=False)
        self.register_buffer("strides", torch.cat([torch.ones(1, dtype=torch.int64), sizes[:-1].cumprod(0)]), False)

    def _bound(self, vectors: Tensor) -> Tensor:
        """(N, C) -> (N, C), each channel squeezed into (-0.5, level - 0.5): rounding gives 0 ... level-1."""
        return (0.5 * squash(vectors) + 0.5) * self.levels - 0.5  # bins of equal width, for odd and even levels alike

    def _missing_entropy(self, bounded: Tensor) -> Tensor:
        """Log K minus the entropy of soft code use over the global batch, in nats: (N, C) -> scalar."""
        part = bounded[:: max(1, len(bounded) // CHUNK_VECTORS)]  # (n, C): all of them would take n x K floats
        use = part.new_ones(len(part), 1)
        for channel, level in enumerate(self.levels.tolist()):
            distances = part[:, channel, None] - torch.arange(level, device=part.device)  # (n, level)
            soft = torch.softmax(-SOFTNESS * distances.square(), dim=1)
            use = (soft[:, :, None] * use[:, None, :]).flatten(1)  # (n, codes so far)
        mean = use.mean(0)  # (K,)
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
            loss = self.entropy_weight * self._missing_entropy(bounded) if train_use else bounded.new_zeros(())
            return Quantized(unflatten_channels(codes, z), indices.view(z.shape[0], *z.shape[2:]), loss)


def build_quantizer(
    name: str,
    n_codes: int,
    code_channels: int,
    fsq_levels: Sequence[int],
    commitment_weight: float,
    ema_decay: float,
    restart_below: float,
    entropy_weight: float,
) -> Quantizer:
    """The quantizer that a configuration names: ``ema``, ``simvq`` or ``fsq``.

    Raises:
        ConfigurationError: unknown name, or FSQ levels that do not give ``n_codes``.
    """
    if name == "ema":
        return EMACodebook(n_codes, code_channels, commitment_weight, ema_decay, restart_below)
    if name == "simvq":
        return SimVQ(n_codes, code_channels, commitment_weight)
    if name == "fsq":
        quantizer = FSQ(fsq_levels, entropy_weight)
        if quantizer.n_codes != n_codes:
            product = "×".join(map(str, fsq_levels))
            raise ConfigurationError(
                f"model.fsq_levels {product} give {quantizer.n_codes} codes, model.n_codes={n_codes}: make them agree"
            )
        return quantizer
    raise ConfigurationError(f"model.quantizer={name!r} is unknown: use ema, simvq or fsq")
