"""The LightningModule of the diffusion model: training on latents, and a validation that takes minutes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from dataset.geometry import spacing_mm
from ddpm.conditioner import Keep
from ddpm.latent_dataset import condition_batch
from ddpm.lora import LoraConfig, inject_lora, lora_parameters
from ddpm.network import LatentDiffusion, Sampling
from ddpm.panel import sample_panel
from ddpm.pretrained import KIND
from ddpm.samplers import NoiseSource
from evaluation.metrics.image import volume_metrics
from vq_gan_3d.distributed import all_reduce_sum, rank, world_size
from vq_gan_3d.latents import FrozenCodec
from vq_gan_3d.optimization import GuardedOptimizer, OptimizerConfig, learning_rate_factor

VALIDATION_SEED = 0


@dataclass(frozen=True)
class ValidationConfig:
    """What is looked at while the model trains.

    Attributes:
        cases: held-out patients whose loss is taken.
        times: noise levels of each of them, evenly spread.
        samples: patients, on each process, for whom a volume is drawn.
        sampling: how.
    """

    cases: int = 32
    times: int = 4
    samples: int = 4
    sampling: Sampling = field(default_factory=lambda: Sampling(steps=10))


@dataclass(frozen=True)
class LoraOrigin:
    """What adapters are trained on top of.

    Attributes:
        config: of the adapters.
        base: checkpoint of the model.
        base_digest: of its weights.
    """

    config: LoraConfig
    base: str
    base_digest: str


class DDPM(pl.LightningModule):
    """Latent diffusion (Rombach et al. 2021, https://arxiv.org/abs/2112.10752, in 3D) under manual optimisation.

    Batches are those of `ddpm.latent_dataset`. ``steps`` counts batches, as in the first stage. All randomness of a
    step depends on the seed, the step and the sample's place in the global batch, so that two processes of batch B
    train as one of batch 2·B.

    Args:
        network: what is trained.
        codec: frozen, for the samples of the validation; outside this module's state.
        optimizer: how.
        validation: what is looked at.
        time_bins: the training loss is logged in so many bins of t.
        lora: train adapters on top of the network as it is; None trains all of it.
    """

    steps: Tensor

    def __init__(
        self,
        network: LatentDiffusion,
        codec: FrozenCodec,
        optimizer: OptimizerConfig,
        validation: ValidationConfig,
        time_bins: int = 4,
        lora: LoraOrigin | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network = network
        self._codec = [codec]  # in a list: no submodule
        self.optimizer_config = optimizer
        self.validation = validation
        self.time_bins = time_bins
        self.lora = lora
        self.total_steps = 0  # set by the runner; the cosine schedule ends there
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        if lora is not None:
            network.requires_grad_(False)
            inject_lora(network.unet, lora.config)
        self._sums: dict[str, list[float]] = {}
        self._truths: list[tuple[Tensor, Tensor]] = []

    @property
    def codec(self) -> FrozenCodec:
        """The frozen codec."""
        return self._codec[0]

    def parameters_by_part(self) -> dict[str, int]:
        """Number of parameters of each part."""
        parts = {"U-Net": self.network.unet, "conditioner": self.network.conditioner}
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
        counts["trained"] = sum(p.numel() for p in self.parameters() if p.requires_grad)
        counts["total"] = sum(p.numel() for p in self.parameters())
        return counts

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One AdamW for all that is trained."""
        c = self.optimizer_config
        trained = lora_parameters(self.network.unet) if self.lora else [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, c.learning_rate, c.betas, weight_decay=c.weight_decay, fused=True)

    def on_fit_start(self) -> None:
        """Wrap the optimizer, which exists only now."""
        c = self.optimizer_config
        self._guarded = GuardedOptimizer(
            "network",
            self,
            self.optimizers(),
            c.accumulate_grad_batches,
            c.gradient_clip_val,
            c.max_bad_steps,
        )
        self.codec.to(self.device)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the step: its randomness depends on seed and step alone, on every rank and after every resume."""
        torch.manual_seed(self.optimizer_config.seed * 1_000_003 + int(self.steps))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One batch; the optimizer moves at the end of an accumulation window."""
        latent = self.network.scaler.to_latent(batch["code"])  # (B, C, d, h, w)
        count, ranks = len(latent), world_size()
        mine = slice(rank() * count, (rank() + 1) * count)
        t = self.network.config.diffusion.sample_times(ranks * count)[mine].to(self.device)
        drawn = self.network.conditioner.draw_keep(ranks * count)
        keep = Keep(drawn.xray[mine], drawn.text[mine], drawn.label[mine])
        seed = self.optimizer_config.seed * 1_000_003 + int(self.steps)
        noise = NoiseSource(seed, range(mine.start, mine.stop)).normal(latent.shape[1:], self.device)
        losses = self.network.losses(latent, condition_batch(batch), noise, t, keep)  # (B,)
        loss = losses.mean()
        self._guarded.backward(loss)
        self.steps += 1
        terms = {"loss": loss.detach()} | self._by_time(losses.detach(), t)
        factor = learning_rate_factor(int(self.steps), self.optimizer_config, self.total_steps)
        if int(self.steps) % self.optimizer_config.accumulate_grad_batches == 0:
            terms["gradient_norm"] = self._guarded.step(self.optimizer_config.learning_rate * factor)
        self.log_dict({f"train/{name}": value for name, value in terms.items()}, batch_size=count)
        self.log("loss", loss.detach(), prog_bar=True, logger=False, batch_size=count)

    def _by_time(self, losses: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Mean loss in each bin of t that has samples."""
        bins = (t * self.time_bins).long().clamp_max(self.time_bins - 1)
        return {f"loss_t{number}": losses[bins == number].mean() for number in bins.unique().tolist()}

    def on_validation_epoch_start(self) -> None:
        """Start counting anew."""
        self._sums, self._truths = {}, []
        self.codec.to(self.device)

    def _count(self, name: str, value: float) -> None:
        entry = self._sums.setdefault(name, [0.0, 0.0])
        entry[0] += value
        entry[1] += 1

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor | None:
        """Loss of one held-out patient at fixed noise; for the first ones a sample, HU (1, 1, D, H, W), is returned."""
        latent = self.network.scaler.to_latent(batch["code"])  # (1, C, d, h, w)
        conditions = condition_batch(batch)
        v = self.validation
        t = (torch.arange(v.times, device=self.device) + 0.5) / v.times
        index = batch_idx * world_size() + rank()
        noise = NoiseSource(VALIDATION_SEED, [index * v.times + number for number in range(v.times)])
        normal = noise.normal(latent.shape[1:], self.device)
        told, untold = self.network.encode_conditions(conditions), self.network.null_conditions(conditions)
        for name, given in (("loss", told), ("loss_without", untold)):
            for number in range(v.times):  # one by one: as much memory as one sample of training
                part = slice(number, number + 1)
                loss = self.network.config.diffusion.losses(
                    lambda x, s, given=given: self.network(x, s, given),  # type: ignore[misc]
                    latent, normal[part], t[part],
                )  # fmt: skip
                self._count(name, float(loss))
                if name == "loss":
                    self._count(f"loss_t{number}", float(loss))
        if batch_idx >= v.samples:
            return None
        code = self.network.sample(conditions, latent.shape[2:], v.sampling, VALIDATION_SEED, [index])
        volume = self.codec.decode(code)  # (1, 1, D, H, W)
        truth = self.codec.window.to_hu(self.codec.window.to_unit(batch["hu"]))
        for name, value in self._compare(volume, truth).items():
            self._count(name, value)
        self._truths.append((volume.cpu(), truth.cpu()))
        return volume

    def _compare(self, volume: Tensor, truth: Tensor) -> dict[str, float]:
        window = self.codec.window
        metrics = volume_metrics(window.to_unit(volume[0, 0]), window.to_unit(truth[0, 0]), window)
        return {f"sample_{name}": metrics[name] for name in ("psnr_db", "mae_hu")}

    def on_validation_epoch_end(self) -> None:
        """Means over all ranks; what a sample is worth for somebody else's patient says what the X-ray adds."""
        if len(self._truths) > 1:
            for number, (volume, _) in enumerate(self._truths):
                _, other = self._truths[(number + 1) % len(self._truths)]
                self._count("sample_psnr_db_shuffled", self._compare(volume, other)["sample_psnr_db"])
        names = ["loss", "loss_without", *(f"loss_t{n}" for n in range(self.validation.times))]
        names += ["sample_psnr_db", "sample_mae_hu", "sample_psnr_db_shuffled"]
        table = torch.tensor([self._sums.get(name, [0.0, 0.0]) for name in names], device=self.device)
        sums = all_reduce_sum(table.float()).tolist()
        metrics = {name: total / count for name, (total, count) in zip(names, sums, strict=True) if count}
        self.log_dict({f"val/{name}": value for name, value in metrics.items()}, rank_zero_only=False)
        self.log("val_loss", metrics["loss"], prog_bar=True, logger=False)

    def panel(self, batch: Mapping[str, Any], output: Tensor | None) -> np.ndarray | None:
        """X-ray, truth, sample and error of a patient that was sampled."""
        if output is None:
            return None
        window = self.codec.window
        truth = window.to_hu(window.to_unit(batch["hu"][0, 0])).cpu().numpy()
        spacing = spacing_mm(batch["affine"][0].cpu().numpy())
        return sample_panel(batch["xray"][0].cpu().numpy(), truth, output[0, 0].cpu().numpy(), spacing)

    def histograms(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What a reader needs to rebuild the model, as plain containers; of a tuned one the adapters alone."""
        checkpoint["kind"] = KIND
        checkpoint["ddpm"] = self.network.config.as_dict()
        if self.lora is None:
            return
        checkpoint["lora"] = {
            "config": self.lora.config.as_dict(),
            "base": self.lora.base,
            "base_digest": self.lora.base_digest,
        }
        kept = {name for name, parameter in self.named_parameters() if parameter.requires_grad} | {"steps"}
        for key in ("state_dict", "current_model_state"):
            if key in checkpoint:
                checkpoint[key] = {name: value for name, value in checkpoint[key].items() if name in kept}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Fill in what a checkpoint of adapters leaves out: the base, which this module has loaded already."""
        if self.lora is not None:
            for key in ("state_dict", "current_model_state"):
                checkpoint[key] = {**self.state_dict(), **checkpoint[key]}
