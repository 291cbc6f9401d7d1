"""The diffusion U-Net: real 3D convolutions, attention where the grid is coarse, conditions of three kinds.

Resolutions are reached by space-to-depth and left by voxel shuffle, with pointwise convolutions between them; the first
entry of ``strides`` is that of the stem, so that the finest features may live on a coarser grid than the latent. Where
conditions come in:

- ``lifted``: X-ray features on the grid of each level, added through a pointwise convolution (which is what joining
  channels before one comes to) on the way down and again on the way up;
- ``tokens``: cross-attention beside every self-attention;
- ``vector``: added to the time embedding, which scales and shifts the channels of every block;
- ``extra``: channels joined to the noisy latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddpm.conditions import Conditions
from ddpm.time_embedding import TimeEmbedding
from ddpm.unet_blocks import Attention, Modulation, ResidualBlock, zero_out
from errors import ConfigurationError, InputError
from vq_gan_3d.encoder_decoder import ChannelNorm, Stride, depth_to_space, repeat_over_shuffle, space_to_depth
from vq_gan_3d.settings import Settings


@dataclass(frozen=True)
class UNetConfig(Settings):
    """Everything that shapes the U-Net; plain numbers that travel in every checkpoint. Levels count fine to coarse.

    Attributes:
        in_channels: of the noisy latent.
        extra_channels: of `Conditions.extra`.
        out_channels: of the prediction.
        widths: feature channels of each level.
        strides: stride [D, H, W] into each level; the first is that from the latent to the finest features.
        blocks: residual blocks of each level on the way down, and again on the way up.
        attention_levels: levels with self-attention (and cross-attention to tokens), after each of their blocks.
        heads: of attention.
        lifted_channels: channels of `Conditions.lifted` at each level, 0 for none there; () for none at all.
        token_channels: channels of `Conditions.tokens`, 0 for none.
        vector_channels: channels of `Conditions.vector`, 0 for none.
        embedding_channels: of the embedding of time and vector.
        checkpointing: recompute each block in the backward pass: less memory, about a third more time.
    """

    subject: ClassVar[str] = "U-Net"
    in_channels: int = 4
    extra_channels: int = 0
    out_channels: int = 4
    widths: tuple[int, ...] = (64, 128, 288)
    strides: tuple[Stride, ...] = ((1, 2, 2), (2, 2, 2), (2, 2, 2))
    blocks: tuple[int, ...] = (1, 1, 2)
    attention_levels: tuple[int, ...] = (2,)
    heads: int = 4
    lifted_channels: tuple[int, ...] = ()
    token_channels: int = 0
    vector_channels: int = 0
    embedding_channels: int = 256
    checkpointing: bool = False

    def __post_init__(self) -> None:
        levels = len(self.widths)
        if not levels or {len(self.strides), len(self.blocks)} != {levels}:
            raise ConfigurationError(
                "unet.widths, unet.strides and unet.blocks need one entry for each level: they have "
                f"{levels}, {len(self.strides)} and {len(self.blocks)}"
            )
        for stride in self.strides:
            if len(stride) != 3 or min(stride) < 1:
                raise ConfigurationError(f"unet.strides: {list(stride)} is no stride [D, H, W] of positive integers")
        if self.lifted_channels and len(self.lifted_channels) != levels:
            raise ConfigurationError(
                f"unet.lifted_channels has {len(self.lifted_channels)} entries for {levels} levels: give one for each"
            )
        for level in self.attention_levels:
            if not 0 <= level < levels:
                raise ConfigurationError(f"unet.attention_levels: there is no level {level}, only 0 to {levels - 1}")
            if self.widths[level] % self.heads:
                raise ConfigurationError(
                    f"unet.heads={self.heads} does not divide the {self.widths[level]} channels of level {level}"
                )
        if self.token_channels and not self.attention_levels:
            raise ConfigurationError("unet.token_channels needs a level in unet.attention_levels to attend from")

    @property
    def total_stride(self) -> Stride:
        """Latent cells per cell of the coarsest level along D, H, W."""
        d, h, w = (prod(stride[axis] for stride in self.strides) for axis in range(3))
        return d, h, w

    def level_shapes(self, shape_dhw: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
        """Grid (D, H, W) of each level, fine to coarse, for a latent of ``shape_dhw`` cells.

        A latent that is no multiple of the total stride is padded at its far ends, so the grids are rounded up.
        """
        grid = [-(-size // step) * step for size, step in zip(shape_dhw, self.total_stride, strict=True)]
        shapes = []
        for stride in self.strides:
            grid = [size // step for size, step in zip(grid, stride, strict=True)]
            shapes.append((grid[0], grid[1], grid[2]))
        return tuple(shapes)


def _outer_conv(inputs: int, outputs: int) -> nn.Conv3d:
    """Stem or head: 3³ where one side is narrow and looking around is cheap, pointwise where all the detail is there.

    On a latent of 64 channels two 3³ ones of 64 to 64 would be a quarter of the operations of the whole network.
    """
    kernel = 1 if inputs == outputs else 3
    return nn.Conv3d(inputs, outputs, kernel, padding=kernel // 2)


class UNet3D(nn.Module):
    """Predicts what the objective asks for from a noisy latent, its time and the conditions."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = c = config
        self.checkpointing = c.checkpointing
        levels = range(len(c.widths))
        self.time_embedding = TimeEmbedding(c.embedding_channels)
        self.vector_projection = nn.Linear(c.vector_channels, c.embedding_channels) if c.vector_channels else None
        inputs = (c.in_channels + c.extra_channels, *c.widths)
        self.downs = nn.ModuleList(
            _outer_conv(before * prod(stride), width) if level == 0 else nn.Conv3d(before * prod(stride), width, 1)
            for level, (before, width, stride) in enumerate(zip(inputs, c.widths, c.strides, strict=False))
        )
        self.down_blocks = nn.ModuleList(self._blocks(level) for level in levels)
        self.ups = nn.ModuleList(
            nn.Conv3d(wide, narrow * prod(stride), 1)
            for (narrow, wide), stride in zip(pairwise(c.widths), c.strides[1:], strict=True)
        )
        self.joins = nn.ModuleList(nn.Conv3d(2 * width, width, 1) for width in c.widths[:-1])
        self.up_blocks = nn.ModuleList(self._blocks(level) for level in levels)
        lifted = c.lifted_channels or (0,) * len(c.widths)
        self.lift_down = nn.ModuleDict(
            {str(level): nn.Conv3d(lifted[level], c.widths[level], 1) for level in levels if lifted[level]}
        )
        self.lift_up = nn.ModuleDict(
            {str(level): nn.Conv3d(lifted[level], c.widths[level], 1) for level in levels if lifted[level]}
        )
        self.norm = ChannelNorm(c.widths[0])
        self.modulation = Modulation(c.widths[0], c.embedding_channels)
        self.head = _outer_conv(c.widths[0], c.out_channels * prod(c.strides[0]))
        zero_out(self.head)
        for up, stride in zip(self.ups, c.strides[1:], strict=True):
            assert isinstance(up, nn.Conv3d)
            repeat_over_shuffle(up, stride)
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def _blocks(self, level: int) -> nn.ModuleList:
        c = self.config
        width, embedding = c.widths[level], c.embedding_channels
        blocks = nn.ModuleList()
        for _ in range(c.blocks[level]):
            blocks.append(ResidualBlock(width, embedding))
            if level in c.attention_levels:
                blocks.append(Attention(width, c.heads, embedding))
                if c.token_channels:
                    blocks.append(Attention(width, c.heads, embedding, c.token_channels))
        return blocks

    def set_checkpointing(self, enabled: bool) -> None:
        """Recompute each block in the backward pass: less memory, about a third more time."""
        self.checkpointing = enabled

    def level_shapes(self, shape_dhw: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
        """See :meth:`UNetConfig.level_shapes`."""
        return self.config.level_shapes(shape_dhw)

    def _run(self, blocks: nn.Module, x: Tensor, embedding: Tensor, tokens: Tensor | None) -> Tensor:
        assert isinstance(blocks, nn.ModuleList)
        for block in blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, embedding, tokens, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, embedding, tokens)
        return x

    def _check(self, x: Tensor, t: Tensor, conditions: Conditions) -> None:
        """Refuse conditions that the configuration does not take, and the lack of those that it does."""
        c = self.config
        if x.dim() != 5 or x.shape[1] != c.in_channels or t.shape != x.shape[:1]:
            raise InputError(
                f"U-Net: latent {list(x.shape)} with times {list(t.shape)}: give (B, {c.in_channels}, d, h, w), (B,)"
            )
        for name, axis, channels in (
            ("tokens", 2, c.token_channels),
            ("vector", 1, c.vector_channels),
            ("extra", 1, c.extra_channels),
        ):
            value = getattr(conditions, name)
            found = 0 if value is None else value.shape[axis]
            if found != channels:
                raise InputError(f"U-Net: condition {name} has {found} channels: {channels} are expected")
        lifted = conditions.lifted or ((),) * len(c.widths)
        if len(lifted) != len(c.widths):
            raise InputError(f"U-Net: lifted features for {len(lifted)} levels: {len(c.widths)} are expected")
        for level, (features, grid) in enumerate(zip(lifted, self.level_shapes(x.shape[2:]), strict=True)):
            channels = c.lifted_channels[level] if c.lifted_channels else 0
            found = list(features.shape[1:]) if isinstance(features, Tensor) else [0, *grid]
            if found != [channels, *grid]:
                raise InputError(f"U-Net: lifted features of level {level} are {found}: give {[channels, *grid]}")

    def _pad(self, x: Tensor) -> Tensor:
        steps = zip(x.shape[2:], self.config.total_stride, strict=True)
        d, h, w = (-size % step for size, step in steps)
        return F.pad(x, (0, w, 0, h, 0, d), mode="replicate") if d or h or w else x

    def forward(self, x: Tensor, t: Tensor, conditions: Conditions | None = None) -> Tensor:
        """Predict.

        Args:
            x: (B, in_channels, d, h, w) noisy latent, any size.
            t: (B,) in [0, 1].
            conditions: what the configuration names, and nothing else.

        Returns:
            (B, out_channels, d, h, w).

        Raises:
            InputError: shapes that do not fit, conditions missing or not expected.
        """
        conditions = conditions or Conditions()
        self._check(x, t, conditions)
        embedding = self.time_embedding(t)  # (B, E)
        if self.vector_projection is not None:
            embedding = embedding + self.vector_projection(conditions.vector)
        embedding = F.silu(embedding)
        tokens, lifted = conditions.tokens, conditions.lifted or ()
        shape = x.shape[2:]
        if conditions.extra is not None:
            x = torch.cat([x, conditions.extra.to(x.dtype)], dim=1)  # (B, in + extra, d, h, w)
        h = self._pad(x)
        skips = []
        for level, (stride, down) in enumerate(zip(self.config.strides, self.downs, strict=True)):
            h = down(space_to_depth(h, stride))  # (B, width, D, H, W) of this level, as below
            if str(level) in self.lift_down:
                h = h + self.lift_down[str(level)](lifted[level])
            h = self._run(self.down_blocks[level], h, embedding, tokens)
            skips.append(h)
        for level in reversed(range(len(skips))):
            if level < len(self.ups):
                h = depth_to_space(self.ups[level](h), self.config.strides[level + 1])
                h = self.joins[level](torch.cat([h, skips[level]], dim=1))
            if str(level) in self.lift_up:
                h = h + self.lift_up[str(level)](lifted[level])
            h = self._run(self.up_blocks[level], h, embedding, tokens)
        h = self.modulation(self.norm(h), embedding)  # (B, widths[0], D, H, W) of level 0
        h = depth_to_space(self.head(h), self.config.strides[0])  # (B, out, d, h, w), padded
        return h[:, :, : shape[0], : shape[1], : shape[2]]  # (B, out, d, h, w)
