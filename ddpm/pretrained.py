"""Load a trained diffusion network: averaged weights, evaluation mode, adapters merged; no Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm.lora import LoraConfig, inject_lora, remove_lora
from ddpm.lora_file import base_digest
from ddpm.network import DDPMConfig, LatentDiffusion
from errors import InputError
from vq_gan_3d.checkpointing import load_checkpoint

KIND = "ddpm"
PREFIX = "network."


def read_ddpm(path: str | Path) -> dict[str, Any]:
    """A checkpoint of the diffusion model, verified.

    Raises:
        InputError: missing, damaged, or of another kind.
    """
    checkpoint = load_checkpoint(path)
    if checkpoint.get("kind") != KIND:
        raise InputError(f"{path}: no checkpoint of a diffusion model: give one of ddpm/train/train_ddpm.py")
    return checkpoint


def network_weights(checkpoint: Mapping[str, Any], *, ema: bool = True) -> dict[str, Tensor]:
    """State dict of the network inside a checkpoint, averaged (default) or raw weights."""
    state = checkpoint["state_dict"] if ema else checkpoint.get("current_model_state", checkpoint["state_dict"])
    return {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}


def load_network(path: str | Path, *, ema: bool = True) -> LatentDiffusion:
    """The network of a checkpoint, on the CPU, in evaluation mode.

    A fine-tuned checkpoint holds adapters alone: they are folded into the base model, which is found where it lay when
    it was tuned.

    Raises:
        InputError: missing, damaged, of another kind, or its base model is gone or another one.
    """
    checkpoint = read_ddpm(path)
    weights = network_weights(checkpoint, ema=ema)
    lora = checkpoint.get("lora")
    if lora is None:
        network = LatentDiffusion(DDPMConfig.from_dict(checkpoint["ddpm"]))
        network.load_state_dict(weights)
        return network.eval()
    network = load_network(lora["base"])
    if base_digest(network) != lora["base_digest"]:
        raise InputError(f"{lora['base']}: not the model that {path} was fine-tuned from: put that one back")
    inject_lora(network.unet, LoraConfig.from_dict(lora["config"]))
    missing, unexpected = network.load_state_dict(weights, strict=False)
    if unexpected or len(missing) + len(weights) != len(network.state_dict()):
        raise InputError(f"{path}: its adapters do not fit the model {lora['base']}")
    remove_lora(network.unet, keep_update=True)
    return network.eval()
