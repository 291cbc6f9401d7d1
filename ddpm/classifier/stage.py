"""The classifier as a training run: what is its own beside the shared machinery of ``vq_gan_3d.training``."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import nn

from dataset.data_module import VolumeDataModule
from dataset.from_config import data_module, plain_dict, size_dhw
from dataset.geometry import spacing_mm
from dataset.sources import VolumeSource
from ddpm.classifier.classifier import PEClassifierModule, patient_hash
from ddpm.classifier.network import ClassifierConfig
from ddpm.classifier.radiographs import RadiographDataModule
from ddpm.conditions import UNKNOWN_LABEL
from ddpm.prepare import label_of
from errors import ConfigurationError, InputError
from vq_gan_3d.hardware import resolve_hardware
from vq_gan_3d.latents import FrozenCodec
from vq_gan_3d.runner import optimizer_config
from vq_gan_3d.stage import Monitor
from vq_gan_3d.training import train_stage

log = logging.getLogger(__name__)


class ClassifierStage:
    """Embolism or none, on volumes, on the latents of a frozen codec, or on radiographs alone."""

    monitor = Monitor("val/auroc", larger_is_better=True)
    memory_hint = "lower training.batch_size or dataset.size, or set hardware.checkpointing=true"
    unused_parameters = False

    def __init__(self) -> None:
        self._codec: FrozenCodec | None = None

    def build_data(self, config: DictConfig) -> VolumeDataModule | RadiographDataModule:
        """The labelled volumes of the cohort, or their radiographs."""
        if (config.model.input == "latent") != bool(config.pretrained_vqgan):
            raise ConfigurationError(
                "model.input=latent and pretrained_vqgan belong together: latents are those of a trained 3D VQ-GAN"
            )
        if config.dataset.patch_size is not None:
            raise ConfigurationError(
                "dataset.patch_size: a label is of a whole volume: leave it null, set dataset.size"
            )
        if config.pretrained_vqgan:
            self._codec = FrozenCodec.load(Path(config.pretrained_vqgan).expanduser())
        data = labelled_data(config)
        if config.model.input != "xray":
            return data
        # refuses a size that its blocks cannot halve before anything is prepared
        return RadiographDataModule(data, ClassifierConfig.from_dict(plain_dict(config.model)).xray_size)

    def build_module(self, config: DictConfig, data: VolumeDataModule | RadiographDataModule) -> PEClassifierModule:
        """The module; its settings remember on which grid it was trained."""
        codec = self._codec
        training = data.datasets["training"].volumes
        spacings = np.array([spacing_mm(volume.affine) for volume in training])
        settings = plain_dict(config.model) | {
            "hu_min": float(config.dataset.hu_min),
            "hu_max": float(config.dataset.hu_max),
            "size_dhw": size_dhw(config.dataset.size),
            "spacing_low_mm": spacings.min(0).tolist(),
            "spacing_high_mm": spacings.max(0).tolist(),
        }
        if codec is not None:
            codec.to("cuda" if resolve_hardware(config.hardware).accelerator == "cuda" else "cpu")
            settings["in_channels"] = codec.channels
        labels = {source.name: label_of(source) for sources in data.sources.values() for source in sources}
        trained_on = {patient_hash(source.patient) for source in data.sources["training"]}
        torch.manual_seed(config.training.seed)
        shape = ClassifierConfig.from_dict(settings)
        module = PEClassifierModule(shape, optimizer_config(config), labels, codec, trained_on)
        module.classifier.set_checkpointing(bool(config.hardware.checkpointing))
        return module

    def contract(self, config: DictConfig) -> dict[str, Any]:
        """The codec."""
        return {"pretrained_vqgan (content)": self._codec.content_hash if self._codec else None}

    def to_compile(self, module: PEClassifierModule) -> Iterable[nn.Module]:
        """The convolutions."""
        return (module.classifier.encoder,)

    def facts(self, module: PEClassifierModule, data: VolumeDataModule | RadiographDataModule) -> list[str]:
        """How many have an embolism."""
        return [
            f"{split}: {sum(module.labels[source.name] for source in sources)} of {len(sources)} with embolism"
            for split, sources in data.sources.items()
        ]


def labelled_data(config: DictConfig) -> VolumeDataModule:
    """The configured cohort without the volumes whose label nobody knows.

    Raises:
        InputError: a split has no volume of either kind, where nothing can be learned or measured.
    """
    data = data_module(config)
    known: dict[str, list[VolumeSource]] = {}
    for split, sources in data.sources.items():
        known[split] = [source for source in sources if label_of(source) != UNKNOWN_LABEL]
        counts = [sum(label_of(source) == value for source in known[split]) for value in (0, 1)]
        if not all(counts):
            raise InputError(
                f"{split}: {counts[1]} volumes with embolism, {counts[0]} without, {len(sources) - sum(counts)} that "
                "nobody labelled: a classifier needs both kinds in each split"
            )
        if unknown := len(sources) - len(known[split]):
            log.warning("%s: %d volumes have no label and are left out", split, unknown)
    data.sources = known
    return data


def train(config: DictConfig) -> int:
    """Train the classifier as configured; returns the exit code."""
    return train_stage(config, ClassifierStage())
