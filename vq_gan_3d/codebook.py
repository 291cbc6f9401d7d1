"""Quantizers with a codebook of their own, EMA and SimVQ, and the choice among all three by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import ConfigurationError
from vq_gan_3d.distributed import all_reduce_sum, rank, world_size
from vq_gan_3d.fsq import FSQ
from vq_gan_3d.quantizer import Quantized, Quantizer, flatten_channels, nearest_codes, squash, unflatten_channels


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
