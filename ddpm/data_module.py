"""The data of a diffusion run: the cohorts and splits of the first stage, as latents with conditions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from dataset.data_module import VolumeDataModule
from dataset.from_config import data_module, plain_dict, size_dhw
from dataset.geometry import spacing_mm
from dataset.on_volumes import OnVolumesDataModule
from dataset.sampler import ResumableSampler
from dataset.xray_augment import XRayAugmentation
from ddpm.latent_dataset import LatentDataset, LatentSettings, Triple, collate_latents
from ddpm.prepare import LatentLibrary, prepare_cases
from errors import ConfigurationError, InputError
from vq_gan_3d.latents import FrozenCodec, LatentScaler, LatentStatistics


class LatentDataModule(OnVolumesDataModule):
    """Latents split by patient, as `VolumeDataModule` splits volumes, which it holds and prepares.

    Args:
        volumes: the cohort; its ``patch_dhw`` is that of crops.
        codec: frozen.
        settings: what a sample holds.
        latents_dir: of ``preprocess/encode_latents.py``; None makes latents on first use.
        validation_cases: at most so many held-out patients are looked at.
        statistics: of a model that is tuned further; None takes those of the training set.
    """

    def __init__(
        self,
        volumes: VolumeDataModule,
        codec: FrozenCodec,
        settings: LatentSettings,
        *,
        latents_dir: Path | None = None,
        validation_cases: int = 32,
        statistics: LatentStatistics | None = None,
    ) -> None:
        super().__init__(volumes)
        self.codec = codec
        self.settings = settings
        self.latents_dir = latents_dir
        self.validation_cases = validation_cases
        self.statistics = statistics
        self.datasets: dict[str, LatentDataset] = {}

    @property
    def latent_dhw(self) -> Triple:
        """Cells of the whole field of the first training volume."""
        return self.datasets["training"].cases[0].latent.shape[1:]

    def build(self, rank: int, world_size: int) -> ResumableSampler:
        """Prepare volumes, latents and radiographs, and the training order; caches make it cheap the second time.

        Raises:
            InputError: too many cases cannot be prepared, or whole fields differ in size.
        """
        self.volumes.build(rank, world_size)
        library = LatentLibrary(self.codec, self.latents_dir, self.volumes.cache)
        cases = {}
        for split, dataset in self.volumes.datasets.items():
            held_out = split == "validation"
            chosen = dataset.volumes[: self.validation_cases] if held_out else dataset.volumes
            cases[split], failed = prepare_cases(
                self.sources[split], chosen, library, self.settings.views, self.volumes.cache, split
            )
            self.bad.update(failed)
            if not cases[split] or len(failed) > self.volumes.max_bad_fraction * len(chosen):
                raise InputError(
                    f"{len(failed)} of {len(chosen)} {split} cases cannot be prepared, more than dataset."
                    f"max_bad_fraction={self.volumes.max_bad_fraction}; the first: {next(iter(failed.values()))}"
                )
        if self.settings.crop_dhw is None:
            shapes = {case.latent.shape for case in cases["training"] + cases["validation"]}
            if len(shapes) > 1:
                raise InputError(f"volumes of different sizes, latents of {sorted(shapes)}: set dataset.size, or crops")
        if self.statistics is None:
            self.statistics = LatentStatistics.of(case.latent for case in cases["training"])
        scaler = LatentScaler(self.statistics)
        for split in cases:
            training = split == "training"
            self.datasets[split] = LatentDataset(
                cases[split],
                self.settings,
                scaler,
                training=training,
                crops_per_volume=self.volumes.patches_per_volume if training else 1,
            )
        return self.take_over(self.datasets, collate_latents, rank, world_size)

    def spacing_statistics(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Mean and standard deviation of the training volumes' voxel spacing (d, h, w) in mm."""
        spacings = np.array([spacing_mm(case.volume.affine) for case in self.datasets["training"].cases])
        mean, std = spacings.mean(0), spacings.std(0)
        return (float(mean[0]), float(mean[1]), float(mean[2])), (float(std[0]), float(std[1]), float(std[2]))


def latent_data_module(
    config: DictConfig, codec: FrozenCodec, statistics: LatentStatistics | None = None
) -> LatentDataModule:
    """The data that ``dataset.*``, ``training.*`` and ``validation.*`` describe.

    Raises:
        ConfigurationError: settings that do not fit each other or the codec.
    """
    d = config.dataset
    codec.window.require_same(type(codec.window)(d.hu_min, d.hu_max), ours="the codec", theirs="dataset.hu_min, hu_max")
    crop = None
    if (patch := size_dhw(d.patch_size)) is not None:
        if any(n % step for n, step in zip(patch, codec.stride_dhw, strict=True)):
            raise ConfigurationError(
                f"dataset.patch_size={list(patch)}: no multiple of the codec's stride {list(codec.stride_dhw)}"
            )
        dd, hh, ww = (n // step for n, step in zip(patch, codec.stride_dhw, strict=True))
        crop = (dd, hh, ww)
    conditioner = config.model.conditioner
    settings = LatentSettings(
        views=tuple(conditioner.views),
        xray_size=conditioner.xray_size,
        crop_dhw=crop,
        context_dhw=None if crop is None else size_dhw(config.model.context_dhw),
        augmentation=_augmentation(d.xray_augmentation),
        tissue_bias=float(d.tissue_bias),
        seed=config.training.seed,
    )
    return LatentDataModule(
        data_module(config),
        codec,
        settings,
        latents_dir=Path(d.latents_dir).expanduser() if d.latents_dir else None,
        validation_cases=config.validation.cases,
        statistics=statistics,
    )


def _augmentation(value: DictConfig | None) -> XRayAugmentation | None:
    if value is None:
        return None
    strengths = plain_dict(value)
    if unknown := sorted(set(strengths) - set(XRayAugmentation.__dataclass_fields__)):
        raise ConfigurationError(f"dataset.xray_augmentation.{unknown[0]}: there is no such effect")
    return XRayAugmentation(**strengths)
