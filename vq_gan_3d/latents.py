"""Latents: what the frozen codec makes of volumes, and how the diffusion model sees them.

Stored (`latent_files`) is the continuous code before quantisation, as ``VQCodec.encode`` gives it; it is quantised when
decoded. The diffusion model works on ``squash(code)``, the bounded value that every quantizer rounds, standardised by
channel: the code itself is whitened but heavy-tailed, and far out on a tail nothing changes for the decoder: an error
there would be paid for without use, whereas after the squash the bins of a channel are equally wide. Ten phantoms under
the demo's codec (2026-11-23): kurtosis by channel 2.9 to 7.6 before and 2.9 to 4.9 after, outermost value 6.3 and 3.3
deviations.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dataset.intensity import HUWindow
from errors import InputError
from vq_gan_3d.checkpointing import save_checkpoint
from vq_gan_3d.codec import VQCodec
from vq_gan_3d.pretrained import load_codec
from vq_gan_3d.quantizer import squash
from vq_gan_3d.tiled import HUArray, encode_tiled

if TYPE_CHECKING:
    from vq_gan_3d.latent_files import LatentFile

Triple = tuple[int, int, int]
_LIMIT = 0.9995  # of squashed values on their way back; beyond it float32 has no inverse, and codes end before
_GAIN = math.atanh(float(squash(torch.ones((), dtype=torch.float64))))


def unsquash(value: Tensor) -> Tensor:
    """Inverse of the quantizers' ``squash``; values at or beyond its range come back finite."""
    return value.clamp(-_LIMIT, _LIMIT).atanh() / _GAIN


def codec_hash(codec: VQCodec, window: HUWindow) -> str:
    """SHA-256 (hex) of all that decides what a codec does: its shape, its weights and its HU window.

    Of the content and not of a file: a training checkpoint and the inference bundle made of it agree.
    """
    digest = hashlib.sha256(json.dumps([codec.config.as_dict(), window.as_dict()], sort_keys=True).encode())
    for name, value in sorted(codec.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class FrozenCodec:
    """A trained codec for use in another model: no gradient, always in evaluation mode, in nobody's ``state_dict``.

    No ``nn.Module``, so that ``.train()``, ``.parameters()`` and averages of the model that holds it pass it by.

    Args:
        codec: is frozen here.
        window: its HU window.
    """

    def __init__(self, codec: VQCodec, window: HUWindow) -> None:
        self.codec = codec.requires_grad_(False).eval()
        self.window = window
        self.content_hash = codec_hash(codec, window)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> FrozenCodec:
        """From a checkpoint of either sibling.

        Raises:
            InputError: missing, damaged, or no checkpoint of the first stage.
        """
        return cls(*load_codec(path, device))

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenCodec:
        """Itself: what never changes needs no copy, not even in an average of the model that holds it."""
        return self

    def to(self, device: torch.device | str) -> FrozenCodec:
        """Move it; returns itself."""
        self.codec.to(device)
        return self

    @property
    def stride_dhw(self) -> Triple:
        """Voxels per latent cell."""
        return self.codec.config.total_stride

    @property
    def channels(self) -> int:
        """Channels of a code."""
        return self.codec.config.code_channels

    def save(self, path: Path) -> None:
        """Write it as a checkpoint that `load` reads: weights in use and nothing of the training.

        Raises:
            StorageError: the disk refuses.
        """
        weights = {f"codec.{name}": value for name, value in self.codec.state_dict().items()}
        content = {"kind": "vq_gan_3d", "codec": self.codec.config.as_dict(), "hu_window": self.window.as_dict()}
        save_checkpoint(path, {**content, "state_dict": weights})

    @torch.no_grad()
    def encode(self, hu: HUArray, precision: torch.dtype | None = None) -> Tensor:
        """Continuous code of a volume (D, H, W) in HU of any size -> (C, d, h, w) float32 on the CPU.

        Args:
            hu: what slices like an array.
            precision: ``torch.bfloat16`` for autocast; None for fp32.
        """
        return encode_tiled(self.codec, hu, self.window, precision=precision)

    @torch.no_grad()
    def decode(self, code: Tensor) -> Tensor:
        """Continuous code (B, C, d, h, w), quantised here -> HU (B, 1, D, H, W) float32."""
        return self.window.to_hu(self.codec.decode(code))  # (B, 1, D, H, W)


@dataclass(frozen=True)
class LatentStatistics:
    """Mean and standard deviation of ``squash(code)`` over a training set, by channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, files: Iterable[LatentFile]) -> LatentStatistics:
        """Over all cells of all files, from the moments that they carry.

        Raises:
            InputError: no files.
        """
        total = np.zeros(0)
        for file in files:
            moments = np.array(file.meta["moments"], dtype=np.float64)  # (3, C): count, sum, sum of squares
            total = moments if not total.size else total + moments
        if not total.size:
            raise InputError("no latents to take statistics of")
        mean = total[1] / total[0]
        std = np.sqrt(np.maximum(total[2] / total[0] - mean**2, 1e-8))
        return cls(tuple(mean.tolist()), tuple(std.tolist()))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LatentStatistics:
        """From a checkpoint."""
        return cls(tuple(values["mean"]), tuple(values["std"]))

    def as_dict(self) -> dict[str, Any]:
        """Plain containers for a checkpoint."""
        return {"mean": list(self.mean), "std": list(self.std)}


class LatentScaler(nn.Module):
    """Code <-> latent of the diffusion model: the one place where squash and statistics are applied.

    Args:
        statistics: of the training set.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, statistics: LatentStatistics) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(statistics.mean).view(-1, 1, 1, 1))
        self.register_buffer("std", torch.tensor(statistics.std).view(-1, 1, 1, 1))

    def to_latent(self, code: Tensor) -> Tensor:
        """Continuous code (..., C, d, h, w) -> latent of mean 0 and variance 1, float32."""
        return (squash(code.float()) - self.mean) / self.std  # (..., C, d, h, w)

    def to_code(self, latent: Tensor) -> Tensor:
        """Inverse of `to_latent`; a latent outside the range of codes comes back as the outermost code."""
        return unsquash(latent.float() * self.std + self.mean)  # (..., C, d, h, w)
