"""Stored latents: one safetensors file a volume, which names the codec that made it and notices damage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dataset.atomic import atomic_write
from errors import ConfigurationError, InputError, one_line
from vq_gan_3d.latents import FrozenCodec, Triple
from vq_gan_3d.quantizer import squash

SUFFIX = ".safetensors"
FORMAT = "x-ray2ctpa latent 1"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


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
