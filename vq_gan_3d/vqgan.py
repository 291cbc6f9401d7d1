"""THE LightningModule of the first stage, shared by the baseline and the patch-wise trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset.geometry import spacing_mm
from dataset.intensity import HUWindow
from errors import ConfigurationError
from evaluation.metrics.codebook import CodeUsage
from evaluation.metrics.image import contains, volume_metrics
from evaluation.metrics.streamed import METRICS, MetricSums, grown
from evaluation.panels import panel_image
from params import MEDIASTINUM_WINDOW
from vq_gan_3d.codec import CodecConfig, VQCodec
from vq_gan_3d.discriminators import PatchDiscriminator, Verdict, plane_slices
from vq_gan_3d.distributed import all_reduce_sum
from vq_gan_3d.losses import adaptive_weight, discriminator_loss, feature_matching_loss, generator_loss
from vq_gan_3d.lpips import LPIPS
from vq_gan_3d.optimization import GuardedOptimizer, OptimizerConfig, learning_rate_factor
from vq_gan_3d.settings import require_number, require_switch, require_whole


@dataclass(frozen=True)
class LossConfig:
    """What is minimised, beside L1 and the codebook's own loss.

    Attributes:
        discriminator_2d: PatchGAN on slices of the three planes.
        discriminator_3d: PatchGAN on volumes.
        discriminator_width: channels of their first layer.
        discriminator_layers: their strided layers.
        discriminator_loss: ``hinge`` or ``vanilla``.
        discriminator_iter_start: batch (counted by this module) from which they take part.
        adversarial_weight: weight of the adversarial term, times the adaptive weight.
        adaptive_weight: balance the adversarial against the reconstruction gradient.
        feature_matching_weight: weight of the feature-matching term.
        slices_per_plane: random slices of each plane and batch for the 2D terms.
        lpips_weight: weight of LPIPS; positive needs ``lpips_weights``.
        lpips_weights: file of local LPIPS weights.
    """

    discriminator_2d: bool = True
    discriminator_3d: bool = True
    discriminator_width: int = 56
    discriminator_layers: int = 3
    discriminator_loss: str = "hinge"
    discriminator_iter_start: int = 10_000
    adversarial_weight: float = 0.1
    adaptive_weight: bool = True
    feature_matching_weight: float = 1.0
    slices_per_plane: int = 2
    lpips_weight: float = 0.0
    lpips_weights: str | None = None

    def __post_init__(self) -> None:
        for key in ("discriminator_2d", "discriminator_3d", "adaptive_weight"):
            require_switch(f"model.{key}", getattr(self, key))
        for key in ("adversarial_weight", "feature_matching_weight", "lpips_weight"):
            require_number(f"model.{key}", getattr(self, key))
        of_slices = self.discriminator_2d or self.lpips_weight > 0
        least = {"discriminator_width": 1, "discriminator_layers": 1, "discriminator_iter_start": 0}
        for key, value in (least | {"slices_per_plane": 1 if of_slices else 0}).items():
            require_whole(f"model.{key}", getattr(self, key), value)
        if self.discriminator_loss not in ("hinge", "vanilla"):
            raise ConfigurationError(f"model.discriminator_loss={self.discriminator_loss!r}: use hinge or vanilla")
        if self.lpips_weight > 0 and not self.lpips_weights:
            raise ConfigurationError(
                "model.lpips_weight is positive: set model.lpips_weights to a local file of LPIPS weights, or it to 0"
            )


class VQGAN(pl.LightningModule):
    """3D VQ-GAN (Esser et al. 2020, https://arxiv.org/abs/2012.09841, in 3D) under manual optimisation.

    Batches hold ``hu`` int16 (B, 1, D, H, W). ``steps`` counts the batches this module was trained on; warm-ups, names
    of checkpoints and the end of training count with it, never with Lightning's ``global_step``, which counts the steps
    of every optimizer.

    Args:
        codec: shape of the generator.
        losses: what is minimised.
        optimizer: how.
        window: the HU window of [0, 1].
        checkpointing: recompute residual blocks in the backward pass.
    """

    steps: Tensor

    def __init__(
        self,
        codec: CodecConfig,
        losses: LossConfig,
        optimizer: OptimizerConfig,
        window: HUWindow,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.codec = VQCodec(codec)
        self.codec.set_checkpointing(checkpointing)
        self.loss_config = losses
        self.optimizer_config = optimizer
        self.window = window
        self.total_steps = 0  # set by the runner; the cosine schedule ends there
        width, layers = losses.discriminator_width, losses.discriminator_layers
        self.discriminators = nn.ModuleDict()
        if losses.discriminator_2d:
            self.discriminators["slices"] = PatchDiscriminator(2, width, layers)
        if losses.discriminator_3d:
            self.discriminators["volume"] = PatchDiscriminator(3, width, layers)
        # in a list, so that frozen weights stay out of checkpoints and averages
        self._lpips = [LPIPS(losses.lpips_weights)] if losses.lpips_weight > 0 and losses.lpips_weights else []
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.usage = CodeUsage(codec.n_codes)
        self._metric_sums: dict[str, float] = {}
        self._metric_count = 0
        self._tiled: dict[str, MetricSums | None] = {}  # by volume; None: a tile of it could not be read

    def parameters_by_part(self) -> dict[str, int]:
        """Number of parameters of each part."""
        parts: dict[str, nn.Module] = {"encoder": self.codec.encoder, "decoder": self.codec.decoder}
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
        generator = sum(p.numel() for p in self.codec.parameters())
        counts["code projections and quantizer"] = generator - sum(counts.values())
        counts["generator"] = generator
        for name, part in self.discriminators.items():
            counts[f"discriminator ({name})"] = sum(p.numel() for p in part.parameters())
        counts["total"] = sum(p.numel() for p in self.parameters())
        return counts

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """One AdamW for the generator, one for the discriminators if there are any; no frozen parameter in either."""
        c = self.optimizer_config
        groups = [list(self.codec.parameters()), list(self.discriminators.parameters())]
        return [
            torch.optim.AdamW(group, c.learning_rate, c.betas, weight_decay=c.weight_decay, fused=True)
            for group in groups
            if group
        ]

    def adversarial_now(self) -> bool:
        """Whether the discriminators take part in this batch."""
        return len(self.discriminators) > 0 and int(self.steps) >= self.loss_config.discriminator_iter_start

    def judge(self, volume: Tensor, positions: Tensor) -> list[Verdict]:
        """Verdicts of all discriminators on (B, 1, D, H, W) and its slices at ``positions`` (3, K)."""
        verdicts = []
        if "volume" in self.discriminators:
            verdicts.append(self.discriminators["volume"](volume))
        if "slices" in self.discriminators:
            verdicts += [self.discriminators["slices"](slices) for slices in plane_slices(volume, positions)]
        return verdicts

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the step: its randomness depends on seed and step alone, on every rank and after every resume."""
        torch.manual_seed(self.optimizer_config.seed * 1_000_003 + int(self.steps))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One batch: generator, then discriminators; optimizers move at the end of an accumulation window."""
        c = self.loss_config
        volume = self.window.to_unit(batch["hu"])  # (B, 1, D, H, W)
        positions = torch.rand(3, c.slices_per_plane)
        adversarial = self.adversarial_now()

        self.discriminators.requires_grad_(False)
        reconstruction = self.codec(volume)
        output = reconstruction.volume.float()  # (B, 1, D, H, W)
        l1 = F.l1_loss(output, volume)
        terms = {"l1": l1, "codebook": reconstruction.codebook_loss}
        loss = l1 + reconstruction.codebook_loss
        for lpips in self._lpips:
            pairs = zip(plane_slices(output, positions), plane_slices(volume, positions), strict=True)
            terms["lpips"] = torch.stack([lpips.to(self.device)(a, b) for a, b in pairs]).mean()
            loss = loss + c.lpips_weight * terms["lpips"]
        if adversarial:
            fake = self.judge(output, positions)
            with torch.no_grad():
                real = self.judge(volume, positions)
            terms["generator"] = generator_loss(fake)
            weight = torch.ones_like(l1)
            if c.adaptive_weight:
                weight = adaptive_weight(l1, terms["generator"], self.codec.decoder.head.weight)
            terms["adaptive_weight"] = weight
            terms["feature_matching"] = feature_matching_loss(real, fake)
            loss = loss + c.adversarial_weight * weight * terms["generator"]
            loss = loss + c.feature_matching_weight * terms["feature_matching"]
        self._guarded[0].backward(loss)

        if adversarial:
            self.discriminators.requires_grad_(True)
            real, fake = self.judge(volume, positions), self.judge(output.detach(), positions)
            terms["discriminator"] = discriminator_loss(real, fake, c.discriminator_loss)
            self._guarded[1].backward(terms["discriminator"])

        self.steps += 1
        factor = learning_rate_factor(int(self.steps), self.optimizer_config, self.total_steps)
        if int(self.steps) % self.optimizer_config.accumulate_grad_batches == 0:
            for guarded in self._guarded[: 2 if adversarial else 1]:
                norm = guarded.step(self.optimizer_config.learning_rate * factor)
                terms[f"gradient_norm_{guarded.name}"] = norm
        self.log_dict({f"train/{name}": value.detach() for name, value in terms.items()}, batch_size=len(volume))
        self.log("l1", l1.detach(), prog_bar=True, logger=False, batch_size=len(volume))

    def on_fit_start(self) -> None:
        """Wrap the optimizers, which exist only now."""
        optimizers = self.optimizers()
        pairs = zip(("generator", "discriminators"), optimizers if isinstance(optimizers, list) else [optimizers])  # noqa: B905
        c = self.optimizer_config
        self._guarded = [
            GuardedOptimizer(name, self, optimizer, c.accumulate_grad_batches, c.gradient_clip_val, c.max_bad_steps)
            for name, optimizer in pairs
        ]

    def on_validation_epoch_start(self) -> None:
        """Start counting anew."""
        self.usage = CodeUsage(self.codec.config.n_codes)
        self._metric_sums, self._metric_count, self._tiled = {}, 0, {}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Metrics of held-out volumes, whole or tile by tile; returns the reconstruction (1, 1, D, H, W) in [0, 1]."""
        volume = self.window.to_unit(batch["hu"])  # (1, 1, D, H, W)
        reconstruction = self.codec(volume)
        output = reconstruction.volume.float().clamp(0, 1)
        if "own" in batch:
            self._add_tile(batch, output[0, 0], volume[0, 0], reconstruction.indices[0])
            return output
        self.usage.update(reconstruction.indices)
        self._add_metrics(volume_metrics(output[0, 0], volume[0, 0], self.window))
        return output

    def _add_metrics(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._metric_sums[name] = self._metric_sums.get(name, 0.0) + value
        self._metric_count += 1

    def _add_tile(self, batch: dict[str, Any], output: Tensor, volume: Tensor, indices: Tensor) -> None:
        """Count the voxels and codes that a tile (D, H, W) answers for; its overlaps are its neighbours'."""
        name, (own, start, shape) = batch["name"][0], (batch[key][0].tolist() for key in ("own", "start", "shape"))
        if batch["skipped"]:
            self._tiled[name] = None
        sums = self._tiled.setdefault(name, MetricSums(shape[0], self.window))
        if sums is None:
            return
        part = tuple(slice(first, last) for first, last in own)
        sums.update(output[part], volume[part], start[0] + own[0][0])
        inside = [(0, min(size, length - at)) for size, length, at in zip(volume.shape, shape, start, strict=True)]
        around = grown(own, inside)
        sums.update_ssim(output[around], volume[around])
        steps = zip(own, self.codec.config.total_stride, strict=True)
        self.usage.update(indices[tuple(slice(first // step, -(-last // step)) for (first, last), step in steps)])

    def on_validation_epoch_end(self) -> None:
        """Means over volumes of all ranks, code use over the whole validation set."""
        for tiled in self._tiled.values():
            if tiled is not None:
                self._add_metrics(tiled.result())
        counts = all_reduce_sum(self.usage.counts.to(self.device)).cpu()
        sums = [float(self._metric_count), *(self._metric_sums.get(name, 0.0) for name in METRICS)]
        total, *values = all_reduce_sum(torch.tensor(sums, device=self.device, dtype=torch.float32)).tolist()
        self.usage.counts = counts
        metrics = {name: value / total for name, value in zip(METRICS, values, strict=True)} if total else {}
        if not contains(self.window):  # of a narrower window, for lungs or mediastinum, it cannot be taken
            metrics.pop("psnr_pe_window_db", None)
        metrics |= {"code_usage": self.usage.usage(), "code_perplexity": self.usage.perplexity()}
        self.log_dict({f"val/{name}": value for name, value in metrics.items()}, rank_zero_only=False)
        self.log("psnr", metrics.get("psnr_db", 0.0), prog_bar=True, logger=False)

    def panel(self, batch: Mapping[str, Any], output: Tensor) -> np.ndarray:
        """Original, reconstruction and error of a validation batch, uint8 (height, width, 3)."""
        original = self.window.to_hu(self.window.to_unit(batch["hu"][0, 0])).cpu().numpy()
        reconstruction = self.window.to_hu(output[0, 0]).cpu().numpy()
        spacing = spacing_mm(batch["affine"][0].cpu().numpy())
        return panel_image(original, reconstruction, spacing, window=MEDIASTINUM_WINDOW)

    def histograms(self) -> dict[str, Tensor]:
        """Share of each code in the validation set."""
        total = self.usage.counts.sum()
        return {"val/code_share": self.usage.counts.double() / total} if total else {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What a reader needs to rebuild the codec, as plain containers."""
        checkpoint["kind"] = "vq_gan_3d"
        checkpoint["codec"] = self.codec.config.as_dict()
        checkpoint["losses"] = asdict(self.loss_config)
        checkpoint["hu_window"] = self.window.as_dict()
