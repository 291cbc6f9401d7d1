"""Latents: what the frozen codec makes of volumes, how they are stored, and how the diffusion model sees them.

Stored is the continuous code before quantisation, as ``VQCodec.encode`` gives it; it is quantised when decoded. The
diffusion model works on ``squash(code)``, the bounded value that every quantizer rounds, standardised by channel: the
code itself is whitened but heavy-tailed, and far out on a tail nothing changes for the decoder, so an error there would
be paid for without use, whereas after the squash the bins of a channel are equally wide. Ten phantoms under the demo's
codec (2026-11-23): kurtosis by channel 2.9 to 7.6 before and 2.9 to 4.9 after, outermost value 6.3 and 3.3 deviations.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dataset.atomic import atomic_write
from dataset.intensity import HUWindow
from errors import ConfigurationError, InputError, one_line
from vq_gan_3d.checkpointing import save_checkpoint
from vq_gan_3d.codec import VQCodec
from vq_gan_3d.pretrained import load_codec
from vq_gan_3d.quantizer import squash
from vq_gan_3d.tiled import HUArray, encode_tiled

SUFFIX = ".safetensors"
FORMAT = "x-ray2ctpa latent 1"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
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


@dataclass(frozen=True)
class LatentFile:
    """A stored latent.

    Attributes:
        path: the file.
        meta: ``codec`` (content hash), ``hu_window``, ``stride_dhw``, ``shape_dhw`` and ``affine`` of the volume,
            ``source``, ``moments`` and ``sha256`` of the numbers.
    """

    path: Path
    meta: dict[str, Any]

    @cached_property
    def shape(self) -> tuple[int, int, int, int]:
        """(C, d, h, w)."""
        c, d, h, w = self.meta["code_shape"]
        return c, d, h, w

    @property
    def affine(self) -> np.ndarray:
        """(4, 4) of the volume, index (d, h, w, 1) -> RAS+ mm."""
        return np.array(self.meta["affine"], dtype=np.float64)

    @property
    def shape_dhw(self) -> Triple:
        """Voxels of the volume."""
        d, h, w = self.meta["shape_dhw"]
        return d, h, w

    def code(self, start: Sequence[int] | None = None, size: Sequence[int] | None = None) -> Tensor:
        """The code, or a crop of it, float32 (C, d, h, w); only the crop is read.

        Raises:
            InputError: the file is damaged or gone.
        """
        try:
            with safe_open(self.path, "pt") as file:
                view = file.get_slice("code")
                begin = start or (0, 0, 0)
                end = [at + length for at, length in zip(begin, size or self.shape[1:], strict=True)]
                return view[:, begin[0] : end[0], begin[1] : end[1], begin[2] : end[2]].float()
        except (OSError, SafetensorError, ValueError) as error:
            raise InputError(f"{self.path}: latent cannot be read ({one_line(error)}): encode it again") from error

    def verify(self) -> LatentFile:
        """Compare the numbers with their checksum; returns itself.

        Raises:
            InputError: they differ, or cannot be read.
        """
        try:
            with safe_open(self.path, "pt") as file:
                found = _sha256(file.get_tensor("code"))
        except (OSError, SafetensorError, ValueError) as error:
            raise InputError(f"{self.path}: latent cannot be read ({one_line(error)}): encode it again") from error
        if found != self.meta["sha256"]:
            raise InputError(f"{self.path}: latent is damaged (its checksum does not match): encode it again")
        return self

    def require(self, codec: FrozenCodec) -> LatentFile:
        """Refuse a latent of another codec or window; returns itself.

        Raises:
            InputError: it is one.
        """
        if self.meta["hu_window"] != codec.window.as_dict():
            raise InputError(
                f"{self.path}: latent was made with HU window {list(self.meta['hu_window'].values())}, the codec has "
                f"{list(codec.window.as_dict().values())}: encode it again with preprocess/encode_latents.py"
            )
        if self.meta["codec"] != codec.content_hash:
            raise InputError(
                f"{self.path}: latent of another codec ({self.meta['codec'][:12]}, not {codec.content_hash[:12]}): "
                "encode it again with preprocess/encode_latents.py, or give the checkpoint that made it"
            )
        return self


def _sha256(code: Tensor) -> str:
    return hashlib.sha256(code.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def write_latent(
    path: Path,
    code: Tensor,
    codec: FrozenCodec,
    affine: np.ndarray,
    shape_dhw: Sequence[int],
    *,
    source: dict[str, Any],
    dtype: str = "float16",
) -> LatentFile:
    """Store a continuous code, atomically: the same bytes for the same input.

    Args:
        path: the .safetensors file; its folder must exist.
        code: (C, d, h, w) on the CPU.
        codec: that made it.
        affine: (4, 4) of the volume.
        shape_dhw: voxels of the volume, before it was padded to the stride.
        source: JSON-able: where the volume came from.
        dtype: ``float16`` or ``bfloat16``.

    Raises:
        ConfigurationError: another dtype.
        InputError: numbers that are not finite.
        StorageError: the disk refuses.
    """
    if dtype not in DTYPES:
        raise ConfigurationError(f"dtype {dtype}: latents are stored as {' or '.join(DTYPES)}")
    stored = code.to(DTYPES[dtype]).contiguous()
    values = squash(stored.double()).flatten(1)  # (C, N)
    if not bool(values.isfinite().all()):
        raise InputError(f"{path}: the code of {source.get('name')} is not finite: is the codec sound?")
    count = torch.full((len(values),), float(values.shape[1]), dtype=torch.float64)
    meta = {
        "format": FORMAT,
        "codec": codec.content_hash,
        "hu_window": asdict(codec.window),
        "stride_dhw": list(codec.stride_dhw),
        "shape_dhw": [int(length) for length in shape_dhw],
        "affine": np.asarray(affine, dtype=np.float64).tolist(),
        "code_shape": list(stored.shape),
        "dtype": {"float16": "F16", "bfloat16": "BF16"}[dtype],
        "source": source,
        "moments": torch.stack([count, values.sum(1), values.square().sum(1)]).tolist(),
        "sha256": _sha256(stored),
    }
    # one entry: safetensors writes several in an order that changes from run to run
    text = json.dumps(meta, sort_keys=True)
    content = save({"code": stored}, {"latent": hashlib.sha256(text.encode()).hexdigest() + text})
    with atomic_write(path) as handle:
        handle.write(content)
    return LatentFile(path, meta)


def open_latent(path: Path) -> LatentFile:
    """Header of a stored latent; `LatentFile.verify` reads the numbers.

    Raises:
        InputError: missing, damaged, or no latent.
    """
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("latent", "")
            view = file.get_slice("code")
            found = view.get_shape(), view.get_dtype()
            checksum, text = text[:64], text[64:]
            sound = hashlib.sha256(text.encode()).hexdigest() == checksum
            meta = json.loads(text) if sound else {}
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"{path}: no readable latent ({one_line(error)}): encode it again") from error
    if meta.get("format") != FORMAT or (meta["code_shape"], meta["dtype"]) != found:
        raise InputError(f"{path}: damaged, or no latent of this project: make it with preprocess/encode_latents.py")
    return LatentFile(path, meta)
