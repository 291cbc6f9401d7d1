"""A 3D classifier of pulmonary embolism, on volumes or on latents: for classifier guidance and for evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import ConfigurationError
from params import HU_MAX, HU_MIN, PE_WINDOW
from vq_gan_3d.encoder_decoder import Encoder, Stage, Stride
from vq_gan_3d.settings import Settings

INPUTS = ("volume", "latent")


@dataclass(frozen=True)
class ClassifierConfig(Settings):
    """Everything that shapes the classifier; plain numbers that travel in every checkpoint.

    Attributes:
        input: ``volume``, (B, 1, D, H, W) in [0, 1] on the HU window; or ``latent``, (B, C, d, h, w) squashed codes.
        in_channels: 1 for volumes, the codec's for latents.
        widths: feature channels of each reducing block, fine to coarse.
        strides: stride (D, H, W) of each reducing block.
        blocks: residual blocks after each reducing block.
        dropout: of pooled features in training.
        hu_min: HU of 0 (volumes).
        hu_max: HU of 1 (volumes).
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

    def __post_init__(self) -> None:
        if self.input not in INPUTS:
            raise ConfigurationError(f"model.input={self.input!r}: one of {', '.join(INPUTS)}")
        if not self.widths or len({len(self.widths), len(self.strides), len(self.blocks)}) != 1:
            raise ConfigurationError(
                "model.widths, model.strides and model.blocks need one entry for each resolution: they have "
                f"{len(self.widths)}, {len(self.strides)} and {len(self.blocks)}"
            )
        if self.input == "volume" and self.in_channels != 1:
            raise ConfigurationError(f"model.in_channels={self.in_channels}: volumes have one channel")


class PEClassifier(nn.Module):
    """Local features, pooled by mean and maximum: a clot is small, and one is enough.

    Any size; what is no multiple of the total stride is padded with air (latents: repeated) at the far ends.

    Args:
        config: its shape.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = c = config
        channels = 2 if c.input == "volume" else c.in_channels
        self.encoder = Encoder(channels, c.widths, c.strides, c.blocks)
        self.dropout = nn.Dropout(c.dropout)
        self.head = nn.Linear(2 * c.widths[-1], 1)
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def set_checkpointing(self, enabled: bool) -> None:
        """Recompute each residual block in the backward pass: less memory, about a third more time."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.checkpointing = enabled

    def features(self, x: Tensor) -> Tensor:
        """(B, channels, D, H, W) of ``config.input`` -> (B, 2 * widths[-1]) pooled features, float32."""
        x = self.encoder(self._pad(self._prepare(x))).float()  # (B, widths[-1], d, h, w)
        return torch.cat([x.mean(dim=(2, 3, 4)), x.amax(dim=(2, 3, 4))], dim=1)

    def logits(self, x: Tensor) -> Tensor:
        """(B, channels, D, H, W) -> (B,) log-odds of an embolism, differentiable in ``x``."""
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
