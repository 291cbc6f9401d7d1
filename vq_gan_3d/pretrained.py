"""Load a trained codec for use: frozen, in evaluation mode, with the HU window it was trained on."""

from __future__ import annotations

from pathlib import Path

import torch

from dataset.intensity import HUWindow
from errors import InputError
from vq_gan_3d.checkpointing import codec_weights, load_checkpoint
from vq_gan_3d.codec import CodecConfig, VQCodec


def load_codec(path: str | Path, device: str | torch.device = "cpu", *, ema: bool = True) -> tuple[VQCodec, HUWindow]:
    """The codec of a training checkpoint of either sibling.

    Args:
        path: a checkpoint.
        device: where to put it.
        ema: averaged weights (default) or the raw ones.

    Returns:
        The codec, frozen and in evaluation mode, and its HU window.

    Raises:
        InputError: missing, damaged, no checkpoint of the first stage, or with weights that are not finite.
    """
    checkpoint = load_checkpoint(path)
    if checkpoint.get("kind") != "vq_gan_3d":
        raise InputError(f"{path}: no checkpoint of a 3D VQ-GAN")
    codec = VQCodec(CodecConfig.from_dict(checkpoint["codec"]))
    try:
        codec.load_state_dict(codec_weights(checkpoint, ema=ema))
    except RuntimeError as error:
        raise InputError(f"{path}: its weights do not fit the codec that it describes: train it again") from error
    for name, value in codec.state_dict().items():  # or it would code volumes into nonsense that looks like HU
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise InputError(f"{path}: its weights {name} are not finite: take an earlier checkpoint of the run")
    return codec.requires_grad_(False).eval().to(device), HUWindow(**checkpoint["hu_window"])
