"""Adapters on disk: one safetensors file that names the model it belongs to by the digest of its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from dataset.atomic import atomic_write
from ddpm.lora import (
    LoraConfig,
    adapter_state_dict,
    inject_lora,
    load_adapter_state_dict,
    lora_layers,
    remove_lora,
)
from errors import ConfigurationError, InputError, one_line

ADAPTER_FORMAT = "xray2ctpa LoRA adapter 1"


def base_digest(model: nn.Module) -> str:
    """SHA-256 of the weights without adapters: the same before, with, and after them, merged or not."""
    adapted = dict(lora_layers(model))
    own = {f"{name}.{part}.weight" for name in adapted for part in ("a", "b")}
    weights = {key: value for key, value in model.state_dict().items() if key not in own}
    for name, layer in adapted.items():
        for part in ("weight", "bias"):
            if (value := weights.pop(f"{name}.base.{part}", None)) is not None:
                weights[f"{name}.{part}"] = value
        weights[f"{name}.weight"] = layer.original
    return _digest(weights)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_adapter(path: str | Path, model: nn.Module) -> None:
    """Write the adapters as one safetensors file whose metadata say rank, alpha, layers and base model.

    Raises:
        ConfigurationError: the model has no adapters.
        StorageError: the disk refuses it; an earlier file stays as it was.
    """
    layers = dict(lora_layers(model))
    if not layers:
        raise ConfigurationError("lora: the model has no adapters to save")
    first = next(iter(layers.values()))
    config = LoraConfig(first.rank, first.scale * first.rank, tuple(layers))
    state = adapter_state_dict(model)
    about = {
        "format": ADAPTER_FORMAT,
        "config": json.dumps(config.as_dict()),
        "base": base_digest(model),
        "content": _digest(state),  # safetensors does not notice a flipped bit
    }
    with atomic_write(path) as handle:
        handle.write(safetensors.torch.save(state, metadata=about))


def load_adapter(path: str | Path, model: nn.Module) -> LoraConfig:
    """Put a saved adapter on the model that it was trained for; everything else is frozen.

    Args:
        path: file of :func:`save_adapter`.
        model: without adapters, changed in place.

    Returns:
        Rank, alpha and the adapted layers.

    Raises:
        InputError: the file is missing, damaged, no adapter, or one of another model.
    """
    path = Path(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: no readable safetensors file ({one_line(error)}): give an adapter") from error
    if about.get("format") != ADAPTER_FORMAT:
        raise InputError(f"{path}: not a LoRA adapter of this project: give a file that save_adapter wrote")
    if about.get("content") != _digest(state):
        raise InputError(f"{path}: damaged, its checksum does not fit: take another copy")
    if about.get("base") != base_digest(model):
        raise InputError(f"{path}: the adapter belongs to another model: load the checkpoint that it was trained on")
    try:
        config = LoraConfig.from_dict(json.loads(about["config"]))
        inject_lora(model, config)
        load_adapter_state_dict(model, state)
    except (KeyError, TypeError, ValueError, ConfigurationError) as error:
        remove_lora(model)
        raise InputError(f"{path}: damaged adapter ({one_line(error)}): write it anew") from error
    return config
