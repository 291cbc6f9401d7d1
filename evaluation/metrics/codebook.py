"""How much of a codebook is used, over a whole validation set (a mean over batches flatters)."""

from __future__ import annotations

import torch
from torch import Tensor


class CodeUsage:
    """Counts code numbers.

    Args:
        n_codes: size of the codebook.
    """

    def __init__(self, n_codes: int) -> None:
        self.counts = torch.zeros(n_codes, dtype=torch.int64)

    def update(self, indices: Tensor) -> None:
        """Count code numbers of any shape, int64."""
        self.counts += torch.bincount(indices.flatten(), minlength=len(self.counts)).cpu()

    def usage(self) -> float:
        """Share of codes that occurred at least once, in [0, 1]."""
        return float((self.counts > 0).double().mean())

    def perplexity(self) -> float:
        """The exponential of the entropy of the code distribution: 1 (one code) ... n_codes (all equally often)."""
        p = self.counts.double() / self.counts.sum().clamp_min(1)
        return float(torch.exp(-torch.special.xlogy(p, p).sum()))
