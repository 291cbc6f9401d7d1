"""A classifier of pulmonary embolism: 3D on volumes or latents, 2D on radiographs; for guidance and for evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.xray_encoder import XRayEncoder
from errors import ConfigurationError
from params import HU_MAX, HU_MIN, PE_WINDOW
from vq_gan_3d.encoder_decoder import Encoder, Stage, Stride
from vq_gan_3d.settings import Settings

INPUTS = ("volume", "latent", "xray")
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class ClassifierConfig(Settings):
    """Everything that shapes the classifier; plain numbers that travel in every checkpoint.

    Attributes:
        input: ``volume``, (B, 1, D, H, W) in [0, 1] on the HU window; ``latent``, (B, C, d, h, w) squashed codes; or
            ``xray``, (B, 1, S, S) standard frontal radiographs (`dataset.xray`).
        in_channels: 1 for volumes and radiographs, the codec's for latents.
        widths: feature channels of each reducing block, fine to coarse.
        strides: stride (D, H, W) of each reducing block; of radiographs every block halves the picture.
        blocks: residual blocks after each reducing block; of radiographs there is one.
        dropout: of pooled features in training.
        hu_min: HU of 0 (volumes).
        hu_max: HU of 1 (volumes).
        xray_size: side of the radiographs in pixels.
        size_dhw: voxels [D, H, W] of the training volumes.
        spacing_low_mm: least voxel spacing (d, h, w) among them.
        spacing_high_mm: greatest.
    """

    subject: ClassVar[str] = "classifier"
    input: str = "volume"
    in_channels: int = 1
    widths: tuple[int, ...] = (32, 64, 96)
    strides: tuple[Stride, ...] = ((1, 2, 2), (2, 2, 2), (2, 2, 2))
    blocks: tuple[int, ...] = (1, 1, 2)
    dropout: float = 0.2
    hu_min: float = HU_MIN
    hu_max: float = HU_MAX
    xray_size: int = 128
    size_dhw: tuple[int, int, int] | None = None
    spacing_low_mm: Triple | None = None
    spacing_high_mm: Triple | None = None

    def __post_init__(self) -> None:
        if self.input not in INPUTS:
            raise ConfigurationError(f"model.input={self.input!r}: one of {', '.join(INPUTS)}")
        levels = {len(self.widths)} if self.input == "xray" else {len(self.strides), len(self.blocks), len(self.widths)}
        if not self.widths or len(levels) != 1:
            raise ConfigurationError(
                "model.widths, model.strides and model.blocks need one entry for each resolution: they have "
                f"{len(self.widths)}, {len(self.strides)} and {len(self.blocks)}"
            )
        if self.input != "latent" and self.in_channels != 1:
            raise ConfigurationError(f"model.in_channels={self.in_channels}: volumes and radiographs have one channel")
        if self.input == "xray" and (self.xray_size < 16 or self.xray_size % 2 ** len(self.widths)):
            raise ConfigurationError(
                f"model.xray_size={self.xray_size}: with {len(self.widths)} widths give a multiple of "
                f"{2 ** len(self.widths)} from 16 on"
            )


class PEClassifier(nn.Module):
    """Local features, pooled by mean and maximum: a clot is small, and one is enough.

    Volumes and latents of any size; what is no multiple of the total stride is padded with air (latents: repeated) at
    the far ends.

    Args:
        config: its shape.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = c = config
        self.encoder: nn.Module
        if c.input == "xray":
            self.encoder = XRayEncoder(c.widths, n_views=1, finest=len(c.widths) - 1)
        else:
            self.encoder = Encoder(2 if c.input == "volume" else c.in_channels, c.widths, c.strides, c.blocks)
            self.encoder.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.dropout = nn.Dropout(c.dropout)
        self.head = nn.Linear(2 * c.widths[-1], 1)

    def set_checkpointing(self, enabled: bool) -> None:
        """Recompute each residual block in the backward pass: less memory, about a third more time."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.checkpointing = enabled

    def feature_map(self, x: Tensor) -> Tensor:
        """Input of ``config.input`` -> (B, widths[-1], d, h, w), of radiographs (B, widths[-1], s, s), float32."""
        if self.config.input == "xray":
            frontal = torch.zeros(len(x), dtype=torch.int64, device=x.device)
            return self.encoder(x, frontal)[-1].float()  # (B, widths[-1], s, s)
        return self.encoder(self._pad(self._prepare(x))).float()  # (B, widths[-1], d, h, w)

    def features(self, x: Tensor) -> Tensor:
        """Input of ``config.input`` -> (B, 2 * widths[-1]) pooled features, float32."""
        x = self.feature_map(x).flatten(2)  # (B, widths[-1], cells)
        return torch.cat([x.mean(dim=2), x.amax(dim=2)], dim=1)  # (B, 2 * widths[-1])

    def logits(self, x: Tensor) -> Tensor:
        """Input of ``config.input`` -> (B,) log-odds of an embolism, differentiable in ``x``."""
        return self.head(self.dropout(self.features(x)))[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        """The same as `logits`."""
        return self.logits(x)

    def _prepare(self, x: Tensor) -> Tensor:
        """The whole window and, of volumes, the reading window of embolisms; both about -1 to 1."""
        if self.config.input == "latent":
            return x
        hu = self.config.hu_min + x * (self.config.hu_max - self.config.hu_min)
        level, width = PE_WINDOW
        reading = ((hu - level) / (width / 2)).clamp(-1, 1)
        return torch.cat([2 * x - 1, reading], dim=1)  # (B, 2, D, H, W)

    def _pad(self, x: Tensor) -> Tensor:
        total = [1, 1, 1]
        for stride in self.config.strides:
            total = [a * b for a, b in zip(total, stride, strict=True)]
        missing = [-size % step for size, step in zip(x.shape[2:], total, strict=True)]
        if not any(missing):
            return x
        padding = [0, missing[2], 0, missing[1], 0, missing[0]]
        if self.config.input == "volume":
            return F.pad(x, padding, value=-1.0)  # air in both windows
        return F.pad(x, padding, mode="replicate")
