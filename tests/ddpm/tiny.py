"""The smallest diffusion run that goes all the way: a codec that nobody trained, latents of 4×4×4 cells."""

from __future__ import annotations

from pathlib import Path

import torch

from dataset.intensity import HUWindow
from ddpm.unet import UNet3D, UNetConfig
from tests.helpers import command
from tests.in_process import DDPM
from vq_gan_3d.codec import CodecConfig, VQCodec
from vq_gan_3d.latents import FrozenCodec

TINY_DDPM = [
    "model=ddpm_small",
    "model.unet.widths=[8,16]",
    "model.unet.blocks=[1,1]",
    "model.unet.heads=2",
    "model.unet.embedding_channels=16",
    "model.conditioner.xray_size=32",
    "model.conditioner.widths=[4,8]",
    "model.conditioner.lifted_channels=[4,4]",
    "model.conditioner.token_channels=8",
    "model.conditioner.vector_channels=8",
    "dataset.size=[16,16,16]",
    "dataset.n_patients=6",
    "training.num_workers=0",
    "training.warmup_steps=2",
    "validation.times=2",
    "validation.samples=2",
    "validation.steps=2",
    "hardware.device=cpu",
    "hardware.mixed_precision=off",
    "callbacks.progress_bar=false",
]


def tiny_codec(seed: int = 0, window: HUWindow | None = None) -> FrozenCodec:
    """A codec of a few channels whose code statistics have seen a little noise, stride 4×4×4."""
    torch.manual_seed(seed)
    config = CodecConfig(widths=(4, 6, 8), encoder_blocks=(1, 1, 1), decoder_blocks=(1, 1, 1), embedding_dim=8)
    codec = VQCodec(config)
    for _ in range(3):
        codec(torch.rand(1, 1, 16, 16, 16))  # code norm follows
    return FrozenCodec(codec, window or HUWindow())


def saved_codec(folder: Path, seed: int = 0) -> Path:
    """The same as a checkpoint."""
    path = folder / f"codec_{seed}.ckpt"
    tiny_codec(seed).save(path)
    return path


def ddpm_command(codec: Path, *overrides: str) -> list[str]:
    """Command line of a tiny diffusion run."""
    return command(DDPM, *TINY_DDPM, f"pretrained_vqgan={codec}", *overrides, tiny=False)


TINY_UNET = UNetConfig(
    in_channels=2,
    out_channels=2,
    widths=(16, 32),
    strides=((1, 2, 2), (2, 2, 2)),
    blocks=(1, 1),
    attention_levels=(1,),
    heads=2,
    embedding_channels=32,
)


def awake_unet(config: UNetConfig = TINY_UNET, seed: int = 0) -> UNet3D:
    """A network with weights in place of the zeros in which its branches start, as after training."""
    torch.manual_seed(seed)
    net = UNet3D(config)
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1)
    return net
