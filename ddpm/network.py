"""The diffusion model as a plain ``nn.Module``: conditioner, U-Net and latent scale; inference loads no Lightning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dataset.intensity import HUWindow
from ddpm.conditioner import Conditioner, Keep
from ddpm.conditioner_config import ConditionerConfig
from ddpm.conditions import ConditionBatch, Conditions, positions
from ddpm.diffusion import Diffusion
from ddpm.guidance import Classifier, ClassifierGuidance, GuidedDenoiser, Range
from ddpm.samplers import NoiseSource, sampler_by_name, time_grid
from ddpm.unet import UNet3D, UNetConfig
from errors import ConfigurationError
from vq_gan_3d.latents import LatentScaler, LatentStatistics

Triple = tuple[int, int, int]
POSITION_CHANNELS = 3


@dataclass(frozen=True)
class DDPMConfig:
    """Everything that a trained model needs to be known by; plain numbers that travel in every checkpoint.

    Attributes:
        unet: of the network.
        diffusion: process and objective.
        conditioner: what the network is told.
        statistics: of the latents.
        codec_hash: content hash of the codec whose latents these are.
        window: HU window of that codec.
        stride_dhw: voxels per latent cell.
        latent_dhw: cells of the whole field that the model was trained on (of the first volume, where they differ).
        crop_dhw: cells of the crops that it was trained on; None for whole fields.
        context_dhw: cells of the low-resolution context of the whole field, for a model of crops; else None.
        spacing_mm: mean and standard deviation of the training volumes' voxel spacing (d, h, w).
    """

    unet: UNetConfig
    diffusion: Diffusion
    conditioner: ConditionerConfig
    statistics: LatentStatistics
    codec_hash: str
    window: HUWindow
    stride_dhw: Triple
    latent_dhw: Triple
    crop_dhw: Triple | None
    context_dhw: Triple | None
    spacing_mm: tuple[tuple[float, float, float], tuple[float, float, float]]

    @classmethod
    def build(
        cls,
        unet: Mapping[str, Any],
        diffusion: Mapping[str, Any],
        conditioner: Mapping[str, Any],
        *,
        channels: int,
        **facts: Any,
    ) -> DDPMConfig:
        """From settings: what follows from the latents and the conditioner is filled in.

        Args:
            unet: settings of the U-Net, without channels in, out and of conditions.
            diffusion: settings of the process.
            conditioner: settings of the conditioner.
            channels: of a latent.
            facts: the remaining attributes.

        Raises:
            ConfigurationError: settings that are unknown or do not fit each other.
        """
        told = ConditionerConfig.from_dict(conditioner)
        extra = POSITION_CHANNELS + (0 if facts["context_dhw"] is None else channels)
        shape = {"in_channels": channels, "out_channels": channels, "extra_channels": extra}
        network = UNetConfig.from_dict({**unet, **shape, **told.unet_arguments(len(unet["widths"]))})
        return cls(network, Diffusion.from_dict(diffusion), told, **facts)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DDPMConfig:
        """From a checkpoint."""
        v = values
        mean, std = v["spacing_mm"]
        return cls(
            UNetConfig.from_dict(v["unet"]),
            Diffusion.from_dict(v["diffusion"]),
            ConditionerConfig.from_dict(v["conditioner"]),
            LatentStatistics.from_dict(v["statistics"]),
            v["codec_hash"],
            HUWindow(**v["window"]),
            _triple(v["stride_dhw"]),
            _triple(v["latent_dhw"]),
            v["crop_dhw"] and _triple(v["crop_dhw"]),
            v["context_dhw"] and _triple(v["context_dhw"]),
            (_triple(mean), _triple(std)),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain containers for a checkpoint."""
        return {
            "unet": self.unet.as_dict(),
            "diffusion": self.diffusion.as_dict(),
            "conditioner": self.conditioner.as_dict(),
            "statistics": self.statistics.as_dict(),
            "codec_hash": self.codec_hash,
            "window": self.window.as_dict(),
            "stride_dhw": list(self.stride_dhw),
            "latent_dhw": list(self.latent_dhw),
            "crop_dhw": self.crop_dhw and list(self.crop_dhw),
            "context_dhw": self.context_dhw and list(self.context_dhw),
            "spacing_mm": [list(triple) for triple in self.spacing_mm],
        }


def _triple(values: Sequence[Any]) -> Any:
    first, second, third = values
    return first, second, third


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn.

    Attributes:
        steps: of the sampler.
        sampler: name in `ddpm.samplers.SAMPLERS`.
        guidance: scale of classifier-free guidance; 1 is off.
        rescale: how far guided samples get their spread back, in [0, 1].
    """

    steps: int = 20
    sampler: str = "dpm_solver_pp_2m"
    guidance: float = 1.0
    rescale: float = 0.0


class LatentDiffusion(nn.Module):
    """Conditioner and U-Net on standardised latents."""

    def __init__(self, config: DDPMConfig) -> None:
        super().__init__()
        self.config = config
        self.scaler = LatentScaler(config.statistics)
        self.unet = UNet3D(config.unet)
        self.conditioner = Conditioner(config.conditioner, config.unet.strides, config.latent_dhw)

    def encode_conditions(self, batch: ConditionBatch, keep: Keep | None = None) -> Conditions:
        """What the U-Net is told of a batch; ``keep`` drops some of it.

        Raises:
            ConfigurationError: a model of crops, and the batch does not say where its crops are.
        """
        return self.conditioner(self._placed(batch), keep)

    def null_conditions(self, batch: ConditionBatch) -> Conditions:
        """The same of patients of whom nothing is known."""
        return self.conditioner.null(self._placed(batch))

    def forward(self, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """Noisy latent (B, C, d, h, w) at times (B,) -> prediction (B, C, d, h, w)."""
        return self.unet(x, t, conditions)

    def losses(self, latent: Tensor, batch: ConditionBatch, noise: Tensor, t: Tensor, keep: Keep | None) -> Tensor:
        """Weighted loss of each sample, (B,).

        Args:
            latent: (B, C, d, h, w), standardised.
            batch: its conditions.
            noise: like latent.
            t: (B,).
            keep: what is used of the conditions.
        """
        conditions = self.encode_conditions(batch, keep)
        return self.config.diffusion.losses(lambda x, s: self(x, s, conditions), latent, noise, t)  # (B,)

    @property
    def latent_range(self) -> Range:
        """Least and greatest latent that a code can have, (C, 1, 1, 1) each: squashed codes are in [-1, 1]."""
        end = torch.full_like(self.scaler.mean, torch.inf)
        return self.scaler.to_latent(-end), self.scaler.to_latent(end)  # (C, 1, 1, 1)

    @torch.no_grad()
    def sample(
        self,
        batch: ConditionBatch,
        grid_dhw: Sequence[int],
        sampling: Sampling,
        seed: int,
        indices: Sequence[int],
        guide: ClassifierGuidance | None = None,
    ) -> Tensor:
        """Continuous codes (B, C, d, h, w) drawn for a batch; each depends on its own seed and index alone.

        Args:
            batch: conditions of B samples, on the network's device.
            grid_dhw: cells of a sample.
            sampling: how.
            seed: of the run.
            indices: number of each sample in the run.
            guide: pulls the samples towards labels (B,); its classifier judges squashed codes (B, C, d, h, w).
        """
        diffusion, device = self.config.diffusion, batch.xray.device
        conditions = self.encode_conditions(batch)
        null = self.null_conditions(batch) if sampling.guidance != 1 else None
        if guide is not None:
            guide = replace(guide, classifier=self._of_latents(guide.classifier))
        denoise = GuidedDenoiser(
            self, diffusion, conditions, null, sampling.guidance, sampling.rescale, guide, self.latent_range
        )
        rng = NoiseSource(seed, indices)
        noise = rng.normal((self.config.unet.in_channels, *grid_dhw), device)
        times = time_grid(sampling.steps, diffusion.schedule).to(device)
        latent = sampler_by_name(sampling.sampler)(denoise, noise, times, diffusion, rng)
        return self.scaler.to_code(latent)  # (B, C, d, h, w)

    def _of_latents(self, classifier: Classifier) -> Classifier:
        """A classifier of squashed codes as one of latents."""
        return lambda latent: classifier(latent * self.scaler.std + self.scaler.mean)

    def _placed(self, batch: ConditionBatch) -> ConditionBatch:
        """With the positions of whole fields: lifted features are the same all along a ray, the place on it is not."""
        if batch.extra is not None:
            return batch
        if self.config.crop_dhw is not None:
            raise ConfigurationError(
                "a model of crops must be told where they are in the whole field: give it crops of its data, or take a "
                "model of whole fields (dataset.patch_size=null)"
            )
        grid = batch.ray_grid.shape[2:5]
        extra = positions(grid, (0, 0, 0), grid).to(batch.ray_grid)  # (3, d, h, w)
        return replace(batch, extra=extra.expand(len(batch.ray_grid), *extra.shape))


def to_device(batch: ConditionBatch, device: torch.device | str) -> ConditionBatch:
    """The same batch on another device."""
    tensors: dict[str, Any] = {
        name: value.to(device) for name, value in vars(batch).items() if isinstance(value, Tensor)
    }
    return replace(batch, **tensors)


def repeat(batch: ConditionBatch, times: int) -> ConditionBatch:
    """Every patient ``times`` times, one after the other."""
    tensors: dict[str, Any] = {
        name: value.repeat_interleave(times, dim=0) for name, value in vars(batch).items() if isinstance(value, Tensor)
    }
    return replace(batch, **tensors, text=tuple(text for text in batch.text for _ in range(times)))
