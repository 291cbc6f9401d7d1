"""The contract of all quantizers, and what they have in common.

All look codes up in a low-dimensional space (a few channels; Yu et al. 2022, https://arxiv.org/abs/2110.04627), which
keeps every code in use and gives the diffusion model a compact latent. All expect whitened input (see ``code_norm``)
and squash it: codes spread evenly over the cube lie where the data is from the first step on, and a vector beyond the
last code cannot run away (its gradient would go on pushing it, the outliers would rule the whitening, and all others
would fall on a few codes: so SimVQ was left with 3 of 512 after 38 steps).

The arithmetic is fp32 whatever the autocast (fp16 sums over 131 k vectors overflow), in chunks (an N×K distance matrix
of a 1 M-voxel batch would take gigabytes).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

CHUNK_VECTORS = 4096


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
