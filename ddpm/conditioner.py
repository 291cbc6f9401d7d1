"""From what is known of patients to what the U-Net takes: lifted features, tokens and one vector.

For classifier-free guidance (Ho and Salimans 2022, https://arxiv.org/abs/2207.12598) a condition is dropped before
anything is computed from it: the X-ray itself goes, so that nothing of it can reach the U-Net by any road, and what
stands in its place is exactly what stands there for a patient who never had one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.conditioner_config import ConditionerConfig
from ddpm.conditions import UNKNOWN_LABEL, ConditionBatch, Conditions
from ddpm.text import build_text_encoder
from ddpm.xray_encoder import (
    Shape,
    XRayEncoder,
    coarser_grid,
    cumulative_strides,
    lift,
    pad_grid,
    scale_of_level,
)
from errors import ConfigurationError

# X-ray tokens of a view: a grid of this many along each side.
TOKEN_GRID = 8


@dataclass(frozen=True)
class Keep:
    """Which conditions of B patients are used; the others are treated as if nobody had given them.

    Attributes:
        xray: (B,) bool, all views of a patient together.
        text: (B,) bool.
        label: (B,) bool.
    """

    xray: Tensor
    text: Tensor
    label: Tensor


class Conditioner(nn.Module):
    """Encodes a `ConditionBatch`.

    Args:
        config: which conditions, and how wide.
        strides: stride (D, H, W) of each level of the U-Net, fine to coarse, as in `UNetConfig.strides`.
        latent_shape: cells (d, h, w) of a latent of the whole field, which says how large a cell is in the picture;
            latents of another size (crops) may come.

    Raises:
        ConfigurationError: ``lifted_channels`` does not fit the levels, or a frozen encoder is missing.
    """

    def __init__(self, config: ConditionerConfig, strides: Sequence[Shape], latent_shape: Shape) -> None:
        super().__init__()
        self.config = config
        c, n_views = config, len(config.views)
        c.unet_arguments(len(strides))  # checks the number of levels
        self.level_strides = cumulative_strides(strides)
        if c.sees_xray:
            if c.image_encoder == "biomedclip":
                from ddpm.biomedclip import BiomedCLIPEncoder

                self.encoder: nn.Module = BiomedCLIPEncoder(c.image_encoder_path)
            n_scales = 1 if c.image_encoder == "biomedclip" else len(c.widths)
            self.scales = [scale_of_level(latent_shape, stride, c.xray_size, n_scales) for stride in self.level_strides]
            if c.image_encoder == "cnn":
                self.encoder = XRayEncoder(c.widths, n_views, min(self.scales) if c.lifting else n_scales - 1)
            channels: tuple[int, ...] = self.encoder.channels  # type: ignore[assignment]
        if c.lifting:
            self.lifters = nn.ModuleList(
                nn.ModuleList(nn.Conv2d(channels[scale], total - n_views, 1) for _ in range(n_views))
                for scale, total in zip(self.scales, c.lifted_channels, strict=True)
            )
        if c.cross_attention:
            self.to_tokens = nn.Linear(channels[-1], c.token_channels)
            self.token_place = nn.Parameter(0.02 * torch.randn(n_views, TOKEN_GRID**2, c.token_channels))
            self.null_token = nn.Parameter(0.02 * torch.randn(n_views, 1, c.token_channels))
        if c.pooled:
            self.to_vector = nn.ModuleList(nn.Linear(2 * channels[-1], c.vector_channels) for _ in range(n_views))
            self.null_vector = nn.Parameter(torch.zeros(n_views, c.vector_channels))
        if c.label:
            self.label = nn.Embedding(UNKNOWN_LABEL + 1, c.vector_channels)
        if c.text != "none":
            self.text = build_text_encoder(c.text, c.text_path, c.token_channels, c.vector_channels)

    def draw_keep(self, n: int) -> Keep:
        """Draw for n patients what a training step uses; the same under the same `torch.manual_seed`, on any device."""
        c, draws = self.config, torch.rand(3, n)
        probabilities = (c.drop_probability, c.text_drop_probability, c.label_drop_probability)
        return Keep(*(draw >= probability for draw, probability in zip(draws, probabilities, strict=True)))

    def null(self, batch: ConditionBatch) -> Conditions:
        """The conditions of patients of whom nothing is known; ``extra`` stays."""
        nobody = torch.zeros(len(batch.text), dtype=torch.bool)
        return self(batch, Keep(nobody, nobody, nobody))

    def forward(self, batch: ConditionBatch, keep: Keep | None = None) -> Conditions:
        """Encode what is known of B patients.

        Args:
            batch: raw conditions.
            keep: what to use of them; None uses all that is there.

        Raises:
            ConfigurationError: the batch has another number of views, or X-rays of another size.
        """
        if keep is not None:
            batch = _without(batch, keep)
        c = self.config
        lifted: tuple[Tensor, ...] | None = None
        tokens: list[Tensor] = []
        vectors: list[Tensor] = []
        if c.sees_xray:
            self._check(batch)
            maps, present = self._encode(batch)
            if c.lifting:
                lifted = self._lift(maps, present, batch.ray_grid)
            if c.cross_attention:
                tokens.append(self._tokens(maps[-1], present))
            if c.pooled:
                vectors.append(self._vector(maps[-1], present))
        if c.label:
            vectors.append(self.label(batch.label))
        if c.text != "none":
            text_tokens, text_vector = self.text(batch.text)
            tokens.append(text_tokens)
            vectors.append(text_vector)
        return Conditions(
            lifted,
            torch.cat(tokens, dim=1) if tokens else None,  # (B, N, token_channels)
            torch.stack(vectors).sum(dim=0) if vectors else None,  # (B, vector_channels)
            batch.extra,
        )

    def _check(self, batch: ConditionBatch) -> None:
        c, (_, n_views, _, height, width) = self.config, batch.xray.shape
        if n_views != len(c.views):
            raise ConfigurationError(f"the batch has {n_views} view(s), the model takes {', '.join(c.views)}")
        if (height, width) != (c.xray_size, c.xray_size):
            raise ConfigurationError(f"X-rays of {height}×{width} pixels, the model takes {c.xray_size}×{c.xray_size}")

    def _encode(self, batch: ConditionBatch) -> tuple[list[Tensor | None], Tensor]:
        """Maps (B * V, C, s, s) of each scale, and which of them are of pictures, (B, V)."""
        b, v = batch.xray_present.shape
        # pixels of an absent picture, whatever they are, are never looked at
        xray = torch.where(batch.xray_present[:, :, None, None, None], batch.xray, 0.0)
        view = torch.arange(v, device=xray.device).repeat(b)
        return self.encoder(xray.reshape(b * v, 1, *xray.shape[-2:]), view), batch.xray_present

    def _lift(self, maps: list[Tensor | None], present: Tensor, ray_grid: Tensor) -> tuple[Tensor, ...]:
        """For each level (B, lifted_channels, d, h, w): features of all views, then a mask for each view."""
        b, v = present.shape
        finest = pad_grid(ray_grid.flatten(0, 1), self.level_strides[-1])
        lifted = []
        for lifters, scale, stride in zip(self.lifters, self.scales, self.level_strides, strict=True):
            grid = coarser_grid(finest, stride).unflatten(0, (b, v))  # (B, V, d, h, w, 2)
            features = maps[scale]
            assert features is not None
            by_view = features.reshape(b, v, *features.shape[1:])
            total: Tensor | None = None
            masks = []
            assert isinstance(lifters, nn.ModuleList)
            for index, lifter in enumerate(lifters):
                found, seen = lift(lifter(by_view[:, index]), grid[:, index])
                there = present[:, index, None, None, None, None]
                found, seen = torch.where(there, found, 0.0), torch.where(there, seen, 0.0)
                total = found if total is None else total + found
                masks.append(seen)
            assert total is not None
            lifted.append(torch.cat([total, *masks], dim=1))  # (B, lifted_channels, d, h, w)
        return tuple(lifted)

    def _tokens(self, coarsest: Tensor | None, present: Tensor) -> Tensor:
        """(B, V * TOKEN_GRID², token_channels)."""
        assert coarsest is not None
        b, v = present.shape
        pooled = F.adaptive_avg_pool2d(coarsest, TOKEN_GRID).flatten(2).transpose(1, 2)  # (B * V, N, C)
        tokens = self.to_tokens(pooled).reshape(b, v, TOKEN_GRID**2, -1) + self.token_place
        return torch.where(present[:, :, None, None], tokens, self.null_token).flatten(1, 2)

    def _vector(self, coarsest: Tensor | None, present: Tensor) -> Tensor:
        """(B, vector_channels)."""
        assert coarsest is not None
        b, v = present.shape
        pooled = torch.cat([coarsest.mean(dim=(2, 3)), coarsest.amax(dim=(2, 3))], dim=1).reshape(b, v, -1)
        vectors = torch.stack([layer(pooled[:, index]) for index, layer in enumerate(self.to_vector)], dim=1)
        return torch.where(present[:, :, None], vectors, self.null_vector).sum(dim=1)


def _without(batch: ConditionBatch, keep: Keep) -> ConditionBatch:
    """The batch without what is not kept."""
    device = batch.xray.device
    return replace(
        batch,
        xray_present=batch.xray_present & keep.xray.to(device)[:, None],
        label=torch.where(keep.label.to(device), batch.label, UNKNOWN_LABEL),
        text=tuple(text if kept else "" for text, kept in zip(batch.text, keep.text.tolist(), strict=True)),
    )
