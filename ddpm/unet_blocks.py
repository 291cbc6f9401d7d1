"""Parts of the diffusion U-Net: residual and attention blocks that the embedding of time and patient modulates.

Pointwise and channels-last like the codec's layers, from which norm and voxel shuffle come: no statistic over space,
one wide 3³ convolution a block. On a CPU that is what makes a step fast (see `benchmarks/ddpm.py`).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vq_gan_3d.encoder_decoder import ChannelNorm

POSITION_FREQUENCIES = 4


def zero_out(layer: nn.Linear | nn.Conv3d) -> None:
    """Let a layer start at 0: its branch begins as nothing, and grows as far as it helps."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def grid_positions(shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """Fourier features of each cell's place in the grid.

    Args:
        shape: cells (D, H, W).
        device: where.

    Returns:
        (D*H*W, 6 * POSITION_FREQUENCIES) float32: sin and cos of 1, 2, 4, 8 half turns over each axis.
    """
    axes = [(torch.arange(size, dtype=torch.float32, device=device) + 0.5) / size for size in shape]
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3, 1)  # (N, 3, 1)
    phase = place * math.pi * 2.0 ** torch.arange(POSITION_FREQUENCIES, device=device)  # (N, 3, F)
    return torch.cat([phase.sin(), phase.cos()], dim=-1).flatten(1)  # (N, 6 F)


class Modulation(nn.Module):
    """Scale and shift of each channel from the embedding (FiLM, Perez et al. 2017, https://arxiv.org/abs/1709.07871)."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        # Not zeroed: the branch that it opens is, and a patient's vector shall act from the first step on.
        self.linear = nn.Linear(embedding, 2 * channels)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Features x (B, C, D, H, W), embedding (B, E) -> the shape and dtype of x."""
        scale, shift = self.linear(embedding).to(x.dtype)[:, :, None, None, None].chunk(2, dim=1)  # (B, C, 1, 1, 1)
        return torch.addcmul(shift, x, 1 + scale)  # (B, C, D, H, W)


class ResidualBlock(nn.Module):
    """``x + conv1(silu(conv3(modulate(norm(x)))))``; starts as the identity.

    Args:
        channels: in and out.
        embedding: channels of the embedding.
    """

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.modulation = Modulation(channels, embedding)
        self.conv_space = nn.Conv3d(channels, channels, 3, padding=1)
        self.conv_channels = nn.Conv3d(channels, channels, 1)
        zero_out(self.conv_channels)

    def forward(self, x: Tensor, embedding: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Features x (B, C, D, H, W), embedding (B, E) -> the same shape; tokens are for attention."""
        h = self.modulation(self.norm(x), embedding)  # (B, C, D, H, W)
        return x + self.conv_channels(F.silu(self.conv_space(h)))  # (B, C, D, H, W)


class Attention(nn.Module):
    """Attention of all cells of a grid to each other (``context_channels=0``) or to tokens; starts as the identity.

    Args:
        channels: in and out.
        heads: they share the channels evenly.
        embedding: channels of the embedding.
        context_channels: channels of the tokens, 0 for self-attention.
    """

    def __init__(self, channels: int, heads: int, embedding: int, context_channels: int = 0) -> None:
        super().__init__()
        self.heads = heads
        self.norm = ChannelNorm(channels)
        self.modulation = Modulation(channels, embedding)
        self.position = nn.Linear(6 * POSITION_FREQUENCIES, channels, bias=False)
        self.context_norm = nn.LayerNorm(context_channels) if context_channels else None
        self.query = nn.Linear(channels, channels)
        self.key_value = nn.Linear(context_channels or channels, 2 * channels)
        self.out = nn.Linear(channels, channels)
        zero_out(self.out)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, C / heads)

    def forward(self, x: Tensor, embedding: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Features x (B, C, D, H, W), embedding (B, E), tokens (B, M, context_channels) -> the shape of x."""
        d, h, w = x.shape[2:]
        cells = self.modulation(self.norm(x), embedding).flatten(2).transpose(1, 2)  # (B, N, C)
        cells = cells + self.position(grid_positions((d, h, w), x.device)).to(cells.dtype)  # (B, N, C)
        if self.context_norm is None:
            context = cells
        else:
            assert tokens is not None
            context = self.context_norm(tokens)  # (B, M, context_channels)
        key, value = self.key_value(context).chunk(2, dim=-1)  # (B, M, C)
        y = F.scaled_dot_product_attention(self._split(self.query(cells)), self._split(key), self._split(value))
        y = self.out(y.transpose(1, 2).flatten(2))  # (B, N, C)
        return x + y.transpose(1, 2).unflatten(2, (d, h, w))  # (B, C, D, H, W)
