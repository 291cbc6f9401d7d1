"""A small model with an output that is not zero, as a bundle; and ways to forge one."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from ddpm.bundle import write_bundle
from ddpm.network import LatentDiffusion
from tests.ddpm.test_training import network
from tests.ddpm.tiny import tiny_codec
from vq_gan_3d.latents import LatentStatistics

SPACING_MM = (4.0, 3.0, 2.0)
QUICK = {"steps": 2}
Run = Callable[..., "subprocess.CompletedProcess[str]"]  # fixture `run` of `tests.inference_command`


def moved_network(**changes: Any) -> LatentDiffusion:
    """Nobody trained it, but its zero-initialised head is moved, so that its conditions count."""
    model = network(
        codec_hash=tiny_codec().content_hash,
        statistics=LatentStatistics((0.0, 0.1, -0.1, 0.0), (0.5,) * 4),
        spacing_mm=(SPACING_MM, (0.1, 0.2, 0.3)),
        **changes,
    )
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
        parameter.data += 0.05 * noise
    return model


def small_bundle(path: Path, **changes: Any) -> Path:
    """Volumes of 16×16×16 voxels from radiographs of 32×32 pixels; ``changes`` as of the network."""
    write_bundle(path, moved_network(**changes), tiny_codec(), training={"steps": 7, "dataset": "nobody"})
    return path


def meta_of(path: Path) -> dict[str, Any]:
    """The metadata of a bundle, unchecked."""
    with safetensors.safe_open(path, "pt") as file:
        return json.loads(file.metadata()["bundle"][64:])


def forged(path: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A bundle whose metadata were changed by somebody who knows how its checksum is made."""
    meta = meta_of(path)
    change(meta)
    text = json.dumps(meta, sort_keys=True)
    checksum = hashlib.sha256(text.encode()).hexdigest()
    target.write_bytes(safetensors.torch.save(safetensors.torch.load_file(path), {"bundle": checksum + text}))
    return target


def places(meta: Any, where: Sequence[str | int] = ()) -> list[tuple[str | int, ...]]:
    """Every place in nested containers."""
    items = meta.items() if isinstance(meta, dict) else enumerate(meta) if isinstance(meta, list) else ()
    return [spot for key, value in items for spot in [(*where, key), *places(value, (*where, key))]]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
