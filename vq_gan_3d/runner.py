"""The first stage as a training run: the 3D VQ-GAN on the volumes of ``dataset.*``."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from dataset.data_module import VolumeDataModule
from dataset.from_config import data_module, plain_dict, size_dhw
from dataset.intensity import HUWindow
from errors import ConfigurationError
from vq_gan_3d.codec import CodecConfig
from vq_gan_3d.optimization import OptimizerConfig
from vq_gan_3d.stage import Monitor
from vq_gan_3d.training import train_stage
from vq_gan_3d.vqgan import VQGAN, LossConfig

log = logging.getLogger(__name__)


def optimizer_config(config: DictConfig) -> OptimizerConfig:
    """How ``training.*`` says to minimise."""
    return OptimizerConfig.from_config(config.training)


def build_module(config: DictConfig) -> VQGAN:
    """The module that ``model.*`` and ``training.*`` describe."""
    model = plain_dict(config.model)
    codec_keys, loss_keys = CodecConfig.__dataclass_fields__, LossConfig.__dataclass_fields__
    codec = CodecConfig.from_dict({key: value for key, value in model.items() if key in codec_keys})
    losses = LossConfig(**{key: value for key, value in model.items() if key in loss_keys})
    window = HUWindow(config.dataset.hu_min, config.dataset.hu_max)
    torch.manual_seed(config.training.seed)
    return VQGAN(codec, losses, optimizer_config(config), window, config.hardware.checkpointing)


def _require_multiple(config: DictConfig, stride: tuple[int, int, int]) -> None:
    """Refuse patches, or whole volumes, that the codec cannot divide into its cells.

    Raises:
        ConfigurationError: a length is no multiple of the total stride [D, H, W].
    """
    key = "size" if config.dataset.patch_size is None else "patch_size"
    size = size_dhw(config.dataset[key])
    if size and any(length % step for length, step in zip(size, stride, strict=True)):
        raise ConfigurationError(
            f"dataset.{key}={list(size)} is no multiple of the codec's total stride {list(stride)} along D, H, W "
            "(the product of model.strides): change one of them"
        )


class FirstStage:
    """The VQ-GAN, baseline and patch-wise."""

    monitor = Monitor("val/psnr_db", larger_is_better=True)
    memory_hint = "lower training.batch_size or dataset.patch_size, or set hardware.checkpointing=true"
    # generator and discriminators are trained in turn, so in each backward pass some parameters are unused
    unused_parameters = True

    def __init__(self) -> None:
        self._module: VQGAN | None = None

    def build_data(self, config: DictConfig) -> VolumeDataModule:
        """Volumes; the module comes first, so that its mistakes are told before anything is prepared."""
        self._module = build_module(config)
        _require_multiple(config, self._module.codec.config.total_stride)
        return data_module(config)

    def build_module(self, config: DictConfig, data: VolumeDataModule) -> VQGAN:
        """The module."""
        assert self._module is not None
        return self._module

    def contract(self, config: DictConfig) -> dict[str, Any]:
        """How volumes are cut."""
        d = config.dataset
        return {
            "dataset.patch_size": None if d.patch_size is None else list(d.patch_size),
            "dataset.patches_per_volume": d.patches_per_volume,
            "dataset.tissue_bias": d.tissue_bias,
            "dataset.overfit_patches": d.overfit_patches,
        }

    def to_compile(self, module: VQGAN) -> Iterable[nn.Module]:
        """Encoder and decoder."""
        return module.codec.encoder, module.codec.decoder

    def facts(self, module: VQGAN, data: VolumeDataModule) -> list[str]:
        """How far the codec looks; warns of discriminators that never take part."""
        start = module.loss_config.discriminator_iter_start
        if len(module.discriminators) and module.total_steps <= start:
            log.warning(
                "model.discriminator_iter_start=%d, and training ends at step %d: no discriminator takes part; raise "
                "training.max_steps or training.num_epochs, or lower it",
                start,
                module.total_steps,
            )
        encoder, decoder = module.codec.config.receptive_halo_vox()
        return [f"receptive halo [D, H, W] in voxels: encoder {list(encoder)}, decoder {list(decoder)}"]


def train(config: DictConfig) -> int:
    """Train the first stage as configured; returns the exit code."""
    return train_stage(config, FirstStage())
