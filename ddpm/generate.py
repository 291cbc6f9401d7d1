"""From X-rays to volumes in HU: a trained diffusion model with its codec. No Lightning on this road."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ddpm.conditions import ConditionBatch
from ddpm.guidance import ClassifierGuidance
from ddpm.network import LatentDiffusion, Sampling, repeat, to_device
from ddpm.pretrained import load_network
from ddpm.samplers import sampler_by_name
from errors import ConfigurationError, InputError
from vq_gan_3d.latents import FrozenCodec

CODEC_NAME = "codec.ckpt"  # in the output folder of a training run


class Generator:
    """A trained model that is ready to use.

    Args:
        network: in evaluation mode.
        codec: whose latents it was trained on.

    Raises:
        InputError: the codec is another one.
    """

    def __init__(self, network: LatentDiffusion, codec: FrozenCodec) -> None:
        if codec.content_hash != network.config.codec_hash:
            raise InputError(
                f"codec {codec.content_hash[:12]}: the diffusion model was trained on latents of codec "
                f"{network.config.codec_hash[:12]}: give the checkpoint of that one"
            )
        self.network = network.requires_grad_(False).eval()
        self.codec = codec

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.network.parameters()).device

    @torch.inference_mode()
    def generate(
        self,
        batch: ConditionBatch,
        shape_dhw: Sequence[int],
        *,
        steps: int = 20,
        sampler: str = "dpm_solver_pp_2m",
        guidance: float = 1.0,
        rescale: float = 0.0,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        samples: int = 1,
        precision: torch.dtype | None = None,
        guide: ClassifierGuidance | None = None,
    ) -> Tensor:
        """Draw volumes.

        What a sample is depends on the seed, its patient's index, its number among the patient's samples and the
        conditions, not on what else is in the batch (to rounding: kernels may sum in another order).

        Args:
            batch: conditions of B patients, rays on the latent grid of the volume.
            shape_dhw: voxels of a volume.
            steps: of the sampler.
            sampler: name in `ddpm.samplers.SAMPLERS`.
            guidance: scale of classifier-free guidance; 1 is off.
            rescale: how far guided samples get their spread back, in [0, 1].
            seed: of all randomness.
            indices: number of each patient in the run; default 0, 1, ….
            samples: volumes for each patient.
            precision: ``torch.bfloat16`` for autocast; None for fp32.
            guide: pulls all samples of each patient towards the patient's label, (B,); its classifier judges squashed
                codes, as that of `ddpm.classifier.guide.load_guide` does.

        Returns:
            float32 HU (B, samples, D, H, W) on the CPU.

        Raises:
            ConfigurationError: an unknown sampler, or settings out of range.
            InputError: rays that do not belong to such a volume.
        """
        sampler_by_name(sampler)
        if samples < 1 or steps < 1:
            raise ConfigurationError(f"steps={steps}, samples={samples}: give 1 or more of each")
        stride = self.codec.stride_dhw
        grid = [-(-length // step) for length, step in zip(shape_dhw, stride, strict=True)]
        patients = len(batch.text)
        if list(batch.ray_grid.shape[2:5]) != grid:
            raise InputError(
                f"rays on a grid of {list(batch.ray_grid.shape[2:5])} cells: a volume of {list(shape_dhw)} has {grid}"
            )
        indices = list(indices) if indices is not None else list(range(patients))
        if len(indices) != patients:
            raise ConfigurationError(f"{len(indices)} indices for {patients} patients: give one for each")
        if guide is not None:
            if guide.label.shape != (patients,):
                raise ConfigurationError(
                    f"guide: labels of shape {list(guide.label.shape)} for {patients} patients: give one for each"
                )
            guide = replace(guide, label=guide.label.repeat_interleave(samples))
        # a stream for each sample of each patient; 2**20 samples of a patient are more than anybody draws
        streams = [(index << 20) + number for index in indices for number in range(samples)]
        sampling = Sampling(steps, sampler, guidance, rescale)
        device = self.device
        with torch.autocast(device.type, dtype=precision, enabled=precision is not None):
            conditions = to_device(repeat(batch, samples), device)
            codes = self.network.sample(conditions, grid, sampling, seed, streams, guide)
            volumes = [self.codec.decode(code[None])[0, 0].cpu() for code in codes]  # one by one: memory of one volume
        d, h, w = shape_dhw
        hu = torch.stack(volumes)[:, :d, :h, :w]
        return hu.reshape(patients, samples, d, h, w)  # (B, samples, D, H, W)


def load_ddpm(path: str | Path, codec_path: str | Path | None = None, device: torch.device | str = "cpu") -> Generator:
    """A trained model with its codec.

    Args:
        path: a checkpoint of ``ddpm/train/train_ddpm.py``.
        codec_path: a checkpoint of the 3D VQ-GAN; default the copy that training left in the run's folder.
        device: where to compute.

    Raises:
        InputError: a checkpoint is missing, damaged, of another kind, or they do not belong together.
    """
    network = load_network(path)
    if codec_path is None:
        codec_path = Path(path).resolve().parent.parent / CODEC_NAME
        if not codec_path.is_file():
            raise InputError(f"{codec_path}: not there: give the checkpoint of the codec that the model was trained on")
    return Generator(network.to(device), FrozenCodec.load(codec_path, device))
