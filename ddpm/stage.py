"""The diffusion model as a training run: what is its own beside the shared machinery of ``vq_gan_3d.training``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from dataset.from_config import plain_dict
from ddpm.conditioner_config import ConditionerConfig
from ddpm.data_module import LatentDataModule, latent_data_module
from ddpm.ddpm import DDPM, LoraOrigin, ValidationConfig
from ddpm.diffusion import Diffusion
from ddpm.generate import CODEC_NAME
from ddpm.lora import LoraConfig
from ddpm.lora_file import base_digest
from ddpm.network import DDPMConfig, LatentDiffusion, Sampling
from ddpm.prepare import encoding_device
from ddpm.pretrained import load_network
from ddpm.samplers import sampler_by_name
from ddpm.unet import UNetConfig
from errors import ConfigurationError
from vq_gan_3d.hardware import resolve_hardware
from vq_gan_3d.latents import FrozenCodec
from vq_gan_3d.resume import flat
from vq_gan_3d.runner import optimizer_config
from vq_gan_3d.stage import Monitor
from vq_gan_3d.training import train_stage


class DDPMStage:
    """Latent diffusion on a frozen codec, from scratch or as adapters on a trained model."""

    monitor = Monitor("val/loss", larger_is_better=False)
    memory_hint = "lower training.batch_size or dataset.patch_size, or set hardware.checkpointing=true"
    # what stands for a dropped condition has no part in a batch that drops none
    unused_parameters = True

    def __init__(self) -> None:
        self._codec: FrozenCodec | None = None
        self._base: LatentDiffusion | None = None

    def build_data(self, config: DictConfig) -> LatentDataModule:
        """Latents of the configured codec."""
        if not config.pretrained_vqgan:
            raise ConfigurationError(
                "pretrained_vqgan is not set: give a checkpoint of the 3D VQ-GAN, "
                "pretrained_vqgan=outputs/checkpoints/final.ckpt"
            )
        if config.lora.enabled != bool(config.pretrained_ddpm):
            raise ConfigurationError(
                "lora.enabled and pretrained_ddpm belong together: adapters are trained on top of a trained model"
            )
        sampler_by_name(config.validation.sampler)  # mistakes are told before anything is prepared
        Diffusion.from_dict(plain_dict(config.model.diffusion))
        ConditionerConfig.from_dict(plain_dict(config.model.conditioner))
        codec = FrozenCodec.load(Path(config.pretrained_vqgan).expanduser())
        codec.to(encoding_device(resolve_hardware(config.hardware).accelerator))
        self._codec = codec
        if config.pretrained_ddpm:
            self._base = base = load_network(Path(config.pretrained_ddpm).expanduser())
            if base.config.codec_hash != codec.content_hash:
                raise ConfigurationError(
                    f"{config.pretrained_ddpm} was trained on latents of codec {base.config.codec_hash[:12]}, "
                    f"{config.pretrained_vqgan} is {codec.content_hash[:12]}: give the one that belongs to it"
                )
            _lora_config(config)
            _require_same_model(config, base.config)
        return latent_data_module(config, codec, self._base.config.statistics if self._base else None)

    def build_module(self, config: DictConfig, data: LatentDataModule) -> DDPM:
        """The module, its network sized by the latents."""
        codec = self._codec
        assert codec is not None
        assert data.statistics is not None
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            codec.save(Path(config.output_dir).expanduser() / CODEC_NAME)
        torch.manual_seed(config.training.seed)
        lora = None
        if self._base is not None:
            network = self._base
            base = str(Path(config.pretrained_ddpm).expanduser().resolve())
            lora = LoraOrigin(_lora_config(config), base, base_digest(network))
        else:
            network = LatentDiffusion(self._network_config(config, data, codec))
        if config.hardware.checkpointing:
            network.unet.set_checkpointing(True)
        v = config.validation
        sampling = Sampling(v.steps, v.sampler, v.guidance, v.rescale)
        validation = ValidationConfig(v.cases, v.times, v.samples, sampling)
        return DDPM(network, codec, optimizer_config(config), validation, config.logger.time_bins, lora)

    def _network_config(self, config: DictConfig, data: LatentDataModule, codec: FrozenCodec) -> DDPMConfig:
        m = plain_dict(config.model)
        return DDPMConfig.build(
            m["unet"],
            m["diffusion"],
            m["conditioner"],
            channels=codec.channels,
            statistics=data.statistics,
            codec_hash=codec.content_hash,
            window=codec.window,
            stride_dhw=codec.stride_dhw,
            latent_dhw=data.latent_dhw,
            crop_dhw=data.settings.crop_dhw,
            context_dhw=data.settings.context_dhw,
            spacing_mm=data.spacing_statistics(),
        )

    def contract(self, config: DictConfig) -> dict[str, Any]:
        """Codec, crops, augmentation and adapters."""
        d, codec = config.dataset, self._codec
        assert codec is not None
        return {
            "pretrained_vqgan (content)": codec.content_hash,
            "pretrained_ddpm (content)": base_digest(self._base) if self._base is not None else None,
            "dataset.patch_size": None if d.patch_size is None else list(d.patch_size),
            "dataset.patches_per_volume": d.patches_per_volume,
            "dataset.tissue_bias": d.tissue_bias,
            "dataset.xray_augmentation": None if d.xray_augmentation is None else plain_dict(d.xray_augmentation),
            "lora": {key: value for key, value in plain_dict(config.lora).items() if key != "targets"},
            "lora.targets": None if config.lora.targets is None else list(config.lora.targets),
        }

    def to_compile(self, module: DDPM) -> Iterable[nn.Module]:
        """The U-Net."""
        return (module.network.unet,)

    def facts(self, module: DDPM, data: LatentDataModule) -> list[str]:
        """What the latents are like."""
        c, s = module.network.config, module.network.config.statistics
        levels = ", ".join("×".join(map(str, shape)) for shape in c.unet.level_shapes(c.crop_dhw or c.latent_dhw))
        means, spreads = (", ".join(f"{value:.3f}" for value in values) for values in (s.mean, s.std))
        return [
            f"codec {c.codec_hash[:16]}, latents {list(c.latent_dhw)} [d, h, w] of {len(s.mean)} channels",
            f"U-Net levels {levels}",
            f"squashed codes by channel: mean {means}; standard deviation {spreads}",
        ]


def _lora_config(config: DictConfig) -> LoraConfig:
    """The adapters that ``lora.*`` describes."""
    settings = plain_dict(config.lora)
    left_out = {"enabled"} | ({"targets"} if settings["targets"] is None else set())
    return LoraConfig.from_dict({key: value for key, value in settings.items() if key not in left_out})


def _require_same_model(config: DictConfig, base: DDPMConfig) -> None:
    """Adapters sit on the base model as it is, and see samples as it takes them: nothing else that is set counts.

    Raises:
        ConfigurationError: settings differ from those of the base; the message holds them as they are typed.
    """
    crops = base.crop_dhw is not None
    if crops != (config.dataset.patch_size is not None):
        raise ConfigurationError(
            f"dataset.patch_size: pretrained_ddpm was trained on {'crops' if crops else 'whole fields'}: "
            f"{'set it' if crops else 'leave it null'}"
        )
    model = plain_dict(config.model)
    ours: dict[str, Any] = {
        "unet": UNetConfig.from_dict(model["unet"]).as_dict(),
        "diffusion": Diffusion.from_dict(model["diffusion"]).as_dict(),
        "conditioner": ConditionerConfig.from_dict(model["conditioner"]).as_dict(),
        "context_dhw": model["context_dhw"],
    }
    theirs = base.as_dict()
    # what the base was given beyond these follows from its latents and its conditioner
    ours["unet"], theirs["unet"] = ({key: part["unet"][key] for key in model["unet"]} for part in (ours, theirs))
    if not crops:
        ours["context_dhw"] = None
    here, there = (flat(json.loads(json.dumps({key: part[key] for key in ours}))) for part in (ours, theirs))
    differing = [key for key in there | here if here.get(key) != there.get(key)]
    if differing:
        wanted = " ".join(f"model.{key}={_typed(there.get(key))}" for key in differing)
        raise ConfigurationError(
            f"adapters leave the model as it is: pretrained_ddpm was trained with {wanted}: set these"
        )


def _typed(value: Any) -> str:
    """A setting as it is typed on the command line."""
    return json.dumps(value, separators=(",", ":")).replace('"', "")


def train(config: DictConfig) -> int:
    """Train the diffusion model as configured; returns the exit code."""
    return train_stage(config, DDPMStage())
