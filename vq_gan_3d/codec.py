"""The codec: volume -> continuous code -> quantised code -> volume, as a plain ``nn.Module``.

Nothing here knows Lightning, Hydra or a training loop: inference, latents and the diffusion model load just this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from errors import ConfigurationError, InputError
from vq_gan_3d.code_norm import CodeNorm
from vq_gan_3d.codebook import build_quantizer
from vq_gan_3d.encoder_decoder import Decoder, Encoder, Stage, Stride
from vq_gan_3d.fsq import SAMPLED_CELLS
from vq_gan_3d.quantizer import Quantized
from vq_gan_3d.settings import Settings, require_number, require_whole

# Over so few cells of a volume the use of more codes says nothing: most are missing however well they are used.
MAX_ENTROPY_CODES = 4 * SAMPLED_CELLS


@dataclass(frozen=True)
class CodecConfig(Settings):
    """Everything that shapes the codec; plain numbers that travel in every checkpoint.

    Attributes:
        widths: feature channels of each reducing block, fine to coarse.
        strides: stride [D, H, W] of each reducing block; the product is the total stride.
        encoder_blocks: residual blocks of the encoder at each resolution, fine to coarse.
        decoder_blocks: the same of the decoder.
        embedding_dim: width of the embedding that the decoder sees.
        code_channels: channels of the space in which codes are looked up (FSQ: one for each of its levels).
        n_codes: size of the codebook.
        quantizer: ``ema``, ``simvq`` or ``fsq``.
        fsq_levels: levels of each FSQ channel; their product is ``n_codes``.
        commitment_weight: weight β of the commitment loss (``ema``, ``simvq``).
        ema_decay: decay of the running means (``ema``).
        restart_below: share of the mean count under which a code is restarted (``ema``).
        entropy_weight: weight of the missing entropy of code use, in nats (``fsq``); 0 above 16,384 codes.
    """

    subject: ClassVar[str] = "codec"
    widths: tuple[int, ...] = (64, 128, 320)
    strides: tuple[Stride, ...] = ((2, 2, 2), (1, 2, 2), (2, 1, 1))
    encoder_blocks: tuple[int, ...] = (2, 1, 4)
    decoder_blocks: tuple[int, ...] = (2, 1, 4)
    embedding_dim: int = 64
    code_channels: int = 4
    n_codes: int = 512
    quantizer: str = "fsq"
    fsq_levels: tuple[int, ...] = field(default=(8, 4, 4, 4))
    commitment_weight: float = 0.25
    ema_decay: float = 0.97
    restart_below: float = 0.03
    entropy_weight: float = 0.02

    def __post_init__(self) -> None:
        for key in ("widths", "strides", "encoder_blocks", "decoder_blocks", "fsq_levels"):
            values = getattr(self, key)
            if not isinstance(values, tuple):
                raise ConfigurationError(f"model.{key}={values}: give a list")
            for value in values if key != "strides" else ():
                require_whole(f"an entry of model.{key}", value, 0 if key.endswith("_blocks") else 1)
        for key in ("embedding_dim", "code_channels", "n_codes"):
            require_whole(f"model.{key}", getattr(self, key), 1)
        for key in ("commitment_weight", "ema_decay", "restart_below", "entropy_weight"):
            require_number(f"model.{key}", getattr(self, key))
        lengths = {len(self.widths), len(self.strides), len(self.encoder_blocks), len(self.decoder_blocks)}
        if len(lengths) != 1:
            raise ConfigurationError(
                "model.widths, model.strides, model.encoder_blocks and model.decoder_blocks need one entry for each "
                f"resolution: they have {len(self.widths)}, {len(self.strides)}, {len(self.encoder_blocks)} and "
                f"{len(self.decoder_blocks)}"
            )
        for stride in self.strides:
            if not (isinstance(stride, tuple) and len(stride) == 3 and all(type(s) is int and s >= 1 for s in stride)):
                shown = list(stride) if isinstance(stride, tuple) else stride
                raise ConfigurationError(f"model.strides: {shown} is no stride [D, H, W] of positive integers")
        if self.quantizer == "fsq" and self.code_channels != len(self.fsq_levels):
            raise ConfigurationError(
                f"model.code_channels={self.code_channels}, but model.fsq_levels has {len(self.fsq_levels)} entries: "
                "FSQ takes one channel for each level"
            )
        if self.quantizer == "fsq" and self.entropy_weight > 0 and prod(self.fsq_levels) > MAX_ENTROPY_CODES:
            raise ConfigurationError(
                f"model.entropy_weight={self.entropy_weight}: the use of {prod(self.fsq_levels)} codes cannot be told "
                f"from {SAMPLED_CELLS} cells of a volume: set it to 0, or model.fsq_levels to at most "
                f"{MAX_ENTROPY_CODES} codes"
            )

    @property
    def total_stride(self) -> Stride:
        """Voxels per latent cell along D, H, W."""
        d, h, w = (prod(stride[axis] for stride in self.strides) for axis in range(3))
        return d, h, w

    def receptive_halo_vox(self) -> tuple[Stride, Stride]:
        """Halo (D, H, W) in voxels of encoder and decoder: a tile with that much around it equals the whole volume.

        The encoder's says how far beyond the edge of its own cell a latent looks into the volume; the decoder's how
        far beyond its own cell's edge a latent reaches when decoded. A 3³ convolution adds one step of the grid it
        lives on; space-to-depth, voxel shuffle and pointwise layers add nothing.
        """

        def halo(blocks: Sequence[int]) -> Stride:
            reach, pitch = [0, 0, 0], [1, 1, 1]
            for level, stride in enumerate(self.strides):
                pitch = [a * b for a, b in zip(pitch, stride, strict=True)]
                convolutions = blocks[level] + (1 if level == 0 else 0)  # the stem or the head is one more
                reach = [a + convolutions * b for a, b in zip(reach, pitch, strict=True)]
            return reach[0], reach[1], reach[2]

        return halo(self.encoder_blocks), halo(self.decoder_blocks)


class Reconstruction(NamedTuple):
    """Output of :meth:`VQCodec.forward`.

    Attributes:
        volume: (B, 1, D, H, W), unbounded.
        indices: (B, D/sd, H/sh, W/sw) int64 code numbers.
        codebook_loss: scalar.
    """

    volume: Tensor
    indices: Tensor
    codebook_loss: Tensor


class VQCodec(nn.Module):
    """3D VQ-GAN generator: encoder, quantizer, decoder.

    Volumes are (B, 1, D, H, W) in [0, 1] on the HU window, any size divisible by the total stride. Codes are
    (B, code_channels, D/sd, H/sh, W/sw), one seamless grid whatever the tiles.
    """

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        self.encoder = Encoder(1, c.widths, c.strides, c.encoder_blocks)
        self.to_code = nn.Conv3d(c.widths[-1], c.code_channels, 1)
        self.code_norm = CodeNorm(c.code_channels)
        self.quantizer = build_quantizer(
            c.quantizer,
            c.n_codes,
            c.code_channels,
            c.fsq_levels,
            c.commitment_weight,
            c.ema_decay,
            c.restart_below,
            c.entropy_weight,
        )
        self.to_embedding = nn.Conv3d(c.code_channels, c.embedding_dim, 1)
        self.decoder = Decoder(1, c.embedding_dim, c.widths, c.strides, c.decoder_blocks)
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def set_checkpointing(self, enabled: bool) -> None:
        """Recompute each residual block in the backward pass: less memory, about a third more time."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.checkpointing = enabled

    def encode(self, volume: Tensor) -> Tensor:
        """Volume (B, 1, D, H, W) in [0, 1] -> continuous code before quantisation (B, code_channels, d, h, w)."""
        stride = self.config.total_stride
        if any(size % step for size, step in zip(volume.shape[2:], stride, strict=True)):
            raise InputError(
                f"volume of {list(volume.shape[2:])} voxels [D, H, W] is no multiple of the codec's total stride "
                f"{list(stride)}: pad it with air and crop the result"
            )
        return self.code_norm(self.to_code(self.encoder(volume)))  # (B, code_channels, d, h, w)

    def decode(self, code: Tensor) -> Tensor:
        """Continuous or quantised code (B, code_channels, d, h, w) -> quantised -> volume (B, 1, D, H, W)."""
        return self.decode_quantized(self.quantizer(code).codes)

    def decode_indices(self, indices: Tensor) -> Tensor:
        """Code numbers (B, d, h, w) int64 -> volume (B, 1, D, H, W)."""
        return self.decode_quantized(self.quantizer.lookup(indices).permute(0, 4, 1, 2, 3))

    def decode_quantized(self, codes: Tensor) -> Tensor:
        """Quantised code (B, code_channels, d, h, w) -> volume (B, 1, D, H, W), unbounded."""
        return self.decoder(self.to_embedding(codes))  # (B, 1, D, H, W)

    def forward(self, volume: Tensor) -> Reconstruction:
        """Reconstruct (B, 1, D, H, W)."""
        quantized: Quantized = self.quantizer(self.encode(volume))
        return Reconstruction(self.decode_quantized(quantized.codes), quantized.indices, quantized.loss)
