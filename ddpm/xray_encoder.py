"""Features of radiographs on the picture's own grid, at several resolutions, and their way into the volume.

A frontal picture sees the plane (D, W); each of its pixels is a ray that runs roughly along H. `lift` carries features
back along the rays: every cell of a 3D grid takes what the picture shows at the place where the cell is seen (as in
Kyung et al. 2023, https://arxiv.org/abs/2303.05297). Along a ray all cells get the same; where on its ray something
lies is for the 3D network to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import ConfigurationError
from vq_gan_3d.encoder_decoder import ChannelNorm

Shape = tuple[int, int, int]


class ResidualBlock2D(nn.Module):
    """``x + conv3(silu(conv3(norm(x))))``; starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        assert self.second.bias is not None
        nn.init.zeros_(self.second.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape."""
        return x + self.second(F.silu(self.first(self.norm(x))))  # (N, C, H, W)


class XRayEncoder(nn.Module):
    """A small residual CNN that goes down and up again; its weights serve all views, which an embedding tells apart.

    Args:
        widths: channels at 1/2, 1/4, … of the picture's resolution.
        n_views: how many views there are.
        finest: the finest of these resolutions that anybody reads, 0 for 1/2; finer ones are not built on the way up.
    """

    def __init__(self, widths: Sequence[int], n_views: int, finest: int = 0) -> None:
        super().__init__()
        if not 0 <= finest < len(widths):
            raise ConfigurationError(f"finest scale {finest}: there are {len(widths)}")
        self.channels = tuple(widths)
        self.finest = finest
        self.stem = nn.Conv2d(4, widths[0], 3, padding=1)
        self.view = nn.Embedding(n_views, widths[0])
        self.downs = nn.ModuleList(nn.Conv2d(4 * fine, coarse, 3, padding=1) for fine, coarse in pairwise(widths))
        self.down_blocks = nn.ModuleList(ResidualBlock2D(width) for width in widths)
        self.ups = nn.ModuleList(nn.Conv2d(coarse, fine, 1) for fine, coarse in pairwise(widths[finest:]))
        self.up_blocks = nn.ModuleList(ResidualBlock2D(width) for width in widths[finest:-1])
        self.norms = nn.ModuleList(ChannelNorm(width) for width in widths[finest:])

    def forward(self, xray: Tensor, view: Tensor) -> list[Tensor | None]:
        """Features of N pictures.

        Args:
            xray: (N, 1, S, S) in [0, 1].
            view: (N,) int64.

        Returns:
            For each of ``widths`` (N, width, s, s), None where it is finer than ``finest``.
        """
        x = self.stem(F.pixel_unshuffle(2 * xray - 1, 2))  # (N, widths[0], S/2, S/2)
        x = self.down_blocks[0](x + self.view(view)[:, :, None, None])
        skips = [x]
        for down, block in zip(self.downs, list(self.down_blocks)[1:], strict=True):
            x = block(down(F.pixel_unshuffle(x, 2)))  # (N, width, s/2, s/2)
            skips.append(x)
        maps: list[Tensor | None] = [None] * len(skips)
        maps[-1] = self.norms[-1](x)
        for scale in range(len(skips) - 2, self.finest - 1, -1):
            step = scale - self.finest
            x = F.interpolate(self.ups[step](x), scale_factor=2.0, mode="bilinear", align_corners=False)
            x = self.up_blocks[step](skips[scale] + x)  # (N, widths[scale], s, s)
            maps[scale] = self.norms[step](x)
        return maps


def cumulative_strides(strides: Sequence[Shape]) -> list[Shape]:
    """Latent cells (d, h, w) that a cell of each level of the U-Net holds, fine to coarse."""
    total = (1, 1, 1)
    cumulative = []
    for stride in strides:
        d, h, w = (a * b for a, b in zip(total, stride, strict=True))
        total = (d, h, w)
        cumulative.append(total)
    return cumulative


def scale_of_level(latent_shape: Shape, stride: Shape, xray_size: int, n_scales: int) -> int:
    """Which scale of the encoder a level of the U-Net reads: the coarsest whose pixels are not larger than its cells.

    Finer ones would be skipped over, coarser ones are blurred.

    Args:
        latent_shape: cells (d, h, w) over the whole field.
        stride: latent cells in a cell of the level.
        xray_size: side of the picture in pixels.
        n_scales: of the encoder; scale k has pixels of ``2 ** (k + 1)``.
    """
    cell_px = int(xray_size / max(size / step for size, step in zip(latent_shape, stride, strict=True)))
    return min(max(cell_px.bit_length() - 2, 0), n_scales - 1)


def pad_grid(grid: Tensor, stride: Shape) -> Tensor:
    """Repeat the last cells at the far ends, up to a multiple of ``stride``, as the U-Net pads its latents.

    Args:
        grid: (N, d, h, w, 2).
        stride: cells (d, h, w).
    """
    missing = [-size % step for size, step in zip(grid.shape[1:4], stride, strict=True)]
    if not any(missing):
        return grid
    padding = [0, missing[2], 0, missing[1], 0, missing[0]]
    return F.pad(grid.movedim(-1, 1), padding, mode="replicate").movedim(1, -1)


def coarser_grid(grid: Tensor, stride: Shape) -> Tensor:
    """Where the cells of a coarser grid are seen: the mean over the cells that each holds.

    Args:
        grid: (N, d, h, w, 2).
        stride: cells (d, h, w) of it in a coarser one; divides its size.

    Returns:
        (N, d / stride, h / stride, w / stride, 2).
    """
    if max(stride) == 1:
        return grid
    return F.avg_pool3d(grid.movedim(-1, 1), tuple(stride)).movedim(1, -1)


def lift(features: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Carry features of pictures along their rays into a volume.

    Args:
        features: (N, C, s, s).
        grid: (N, d, h, w, 2), (x, y) in [-1, 1] of each cell, outside that range where the picture does not show it.

    Returns:
        (N, C, d, h, w) float32, zero in cells that are not seen, and (N, 1, d, h, w) float32, one where they are.
    """
    n, d, h, w, _ = grid.shape
    # bf16 has 8 bits for a place among 256 pixels, so never under autocast
    with torch.autocast(features.device.type, enabled=False):
        places = grid.float().reshape(n, d, h * w, 2)
        seen = (places.abs() <= 1).all(dim=-1).reshape(n, 1, d, h, w).float()
        found = F.grid_sample(features.float(), places, mode="bilinear", padding_mode="border", align_corners=False)
        return found.reshape(n, -1, d, h, w) * seen, seen  # (N, C, d, h, w), (N, 1, d, h, w)
