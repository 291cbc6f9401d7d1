"""Training of the PE classifier: a LightningModule of the shared machinery."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset.intensity import HUWindow
from dataset.prepared import short_hash
from ddpm.classifier.network import ClassifierConfig, PEClassifier
from errors import InputError
from evaluation.metrics.statistics import auroc
from params import HU_AIR
from vq_gan_3d.checkpointing import load_checkpoint
from vq_gan_3d.distributed import world_size
from vq_gan_3d.latents import FrozenCodec
from vq_gan_3d.optimization import GuardedOptimizer, OptimizerConfig, learning_rate_factor
from vq_gan_3d.quantizer import squash

KIND = "pe_classifier"
_SHIFT_VOX = 4


class PEClassifierModule(pl.LightningModule):
    """Binary cross-entropy on labels of whole volumes, under manual optimisation.

    Batches hold ``name`` and ``hu`` int16 (B, 1, D, H, W), or of ``input=xray`` ``xray`` (B, 1, S, S) in [0, 1]. All
    randomness of a step depends on seed and step alone.

    Args:
        config: shape of the classifier.
        optimizer: how it is trained.
        labels: 0 or 1 for each name.
        codec: makes the latents of ``input=latent``; outside this module's state.
        trained_on: hashes of the training patients (`patient_hash`), by which an evaluation finds out that a case is
            none that this classifier has never seen.
    """

    steps: Tensor

    def __init__(
        self,
        config: ClassifierConfig,
        optimizer: OptimizerConfig,
        labels: Mapping[str, int],
        codec: FrozenCodec | None = None,
        trained_on: Iterable[str] = (),
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.classifier = PEClassifier(config)
        self.window = HUWindow(config.hu_min, config.hu_max)
        self.optimizer_config = optimizer
        self.labels = dict(labels)
        self.trained_on = sorted(trained_on)
        self._codec = [codec] if codec is not None else []  # in a list: no submodule
        self.total_steps = 0  # set by the runner; the cosine schedule ends there
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._scores: list[tuple[float, int]] = []

    def parameters_by_part(self) -> dict[str, int]:
        """Number of parameters of each part."""
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in self.classifier.named_children()}
        counts["total"] = sum(p.numel() for p in self.parameters())
        return {name: count for name, count in counts.items() if count}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One AdamW."""
        c = self.optimizer_config
        return torch.optim.AdamW(self.parameters(), c.learning_rate, c.betas, weight_decay=c.weight_decay, fused=True)

    def on_fit_start(self) -> None:
        """Wrap the optimizer, which exists only now."""
        c = self.optimizer_config
        self._guarded = GuardedOptimizer(
            "classifier", self, self.optimizers(), c.accumulate_grad_batches, c.gradient_clip_val, c.max_bad_steps
        )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the step: its randomness depends on seed and step alone, on every rank and after every resume."""
        torch.manual_seed(self.optimizer_config.seed * 1_000_003 + int(self.steps))

    def input_of(self, batch: dict[str, Any], *, moved: bool = False) -> Tensor:
        """What the classifier takes of a batch: volumes in [0, 1], their squashed codes, or radiographs.

        Args:
            batch: see the class.
            moved: mirrored and shifted at random, for training.
        """
        if self.classifier.config.input == "xray":
            return augment(batch["xray"], 0) if moved else batch["xray"]
        hu = augment(batch["hu"], HU_AIR) if moved else batch["hu"]
        return classifier_input(hu, self.window, self._codec[0] if self._codec else None)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One batch; the optimizer moves at the end of an accumulation window."""
        labels = self._labels(batch)
        scores = self.classifier(self.input_of(batch, moved=True)).float()  # (B,)
        loss = F.binary_cross_entropy_with_logits(scores, labels)
        self._guarded.backward(loss)
        self.steps += 1
        terms = {"loss": loss.detach()}
        factor = learning_rate_factor(int(self.steps), self.optimizer_config, self.total_steps)
        if int(self.steps) % self.optimizer_config.accumulate_grad_batches == 0:
            terms["gradient_norm"] = self._guarded.step(self.optimizer_config.learning_rate * factor)
        self.log_dict({f"train/{name}": value for name, value in terms.items()}, batch_size=len(labels))
        self.log("loss", loss.detach(), prog_bar=True, logger=False, batch_size=len(labels))

    def _labels(self, batch: dict[str, Any]) -> Tensor:
        return torch.tensor([float(self.labels[name]) for name in batch["name"]], device=self.device)

    def on_validation_epoch_start(self) -> None:
        """Start counting anew."""
        self._scores = []

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Score of one held-out case."""
        score = self.classifier(self.input_of(batch)).float()
        self._scores += zip(score.tolist(), map(int, self._labels(batch).tolist()), strict=True)

    def on_validation_epoch_end(self) -> None:
        """AUROC and loss over the held-out cases of all ranks."""
        gathered = [self._scores]
        if world_size() > 1:
            gathered = [[] for _ in range(world_size())]
            torch.distributed.all_gather_object(gathered, self._scores)
        table = torch.tensor([row for scores in gathered for row in scores])  # (N, 2)
        scores, labels = table[:, 0], table[:, 1]
        loss = F.binary_cross_entropy_with_logits(scores, labels)
        area = auroc(scores.numpy(), labels.numpy() > 0.5)
        self.log_dict({"val/loss": loss, "val/auroc": torch.tensor(area)}, rank_zero_only=False)
        self.log("auroc", area, prog_bar=True, logger=False)

    def panel(self, batch: Mapping[str, Any], output: Any) -> np.ndarray | None:
        """None: there is no picture of a score."""
        return None

    def histograms(self) -> dict[str, Tensor]:
        """Scores of held-out cases with and without embolism."""
        groups = {"with_pe": 1, "without_pe": 0}
        found = {name: [score for score, label in self._scores if label == value] for name, value in groups.items()}
        return {f"val/scores_{name}": torch.tensor(scores) for name, scores in found.items() if scores}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What a reader needs to rebuild the classifier, as plain containers."""
        checkpoint["kind"] = KIND
        checkpoint["classifier"] = self.classifier.config.as_dict()
        checkpoint["codec_hash"] = self._codec[0].content_hash if self._codec else None
        checkpoint["trained_on"] = self.trained_on


def classifier_input(hu: Tensor, window: HUWindow, codec: FrozenCodec | None) -> Tensor:
    """(B, 1, D, H, W) int16 HU -> the volume in [0, 1], or with a codec its squashed code (B, C, d, h, w)."""
    unit = window.to_unit(hu)
    if codec is None:
        return unit
    with torch.no_grad():
        codec.to(hu.device)
        return squash(codec.codec.encode(codec.window.to_unit(hu))).float()  # (B, C, d, h, w)


def augment(x: Tensor, fill: float) -> Tensor:
    """Mirror left and right half of the time and shift by a few voxels or pixels; all of a batch alike.

    Only here is a chest mirrored: an embolism has no side that the label knows, and a judge of volumes need not know
    where the heart lies. What is generated is never mirrored.

    Args:
        x: (B, 1, D, H, W) or (B, 1, S, S), left and right along the last axis.
        fill: what moves in.
    """
    if torch.rand(()) < 0.5:
        x = x.flip(-1)
    shift = torch.randint(-_SHIFT_VOX, _SHIFT_VOX + 1, (x.dim() - 2,)).tolist()
    pad = [amount for axis in reversed(shift) for amount in (max(axis, 0), max(-axis, 0))]
    moved = F.pad(x, pad, value=fill)
    for axis, (by, length) in enumerate(zip(shift, x.shape[2:], strict=True), start=2):
        moved = moved.narrow(axis, max(-by, 0), length)
    return moved


def patient_hash(patient: str) -> str:
    """What a checkpoint remembers of a training patient: enough to recognise the name, not to read it."""
    return short_hash(f"patient {patient}")


def load_classifier(
    path: str | Path, device: str | torch.device = "cpu", *, ema: bool = True
) -> tuple[PEClassifier, str | None]:
    """The classifier of a training checkpoint, frozen and in evaluation mode; `judge.Judge` knows more of it.

    Args:
        path: a checkpoint of `train_classifier.py`.
        device: where to put it.
        ema: averaged weights (default) or the raw ones.

    Returns:
        The classifier, and of one on latents the content hash of their codec.

    Raises:
        InputError: missing, damaged, or no checkpoint of a classifier.
    """
    checkpoint = read_checkpoint(path)
    return classifier_of(checkpoint, ema=ema).to(device), checkpoint["codec_hash"]


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Content of a checkpoint of a classifier.

    Raises:
        InputError: missing, damaged, or no checkpoint of a classifier.
    """
    checkpoint = load_checkpoint(path)
    if checkpoint.get("kind") != KIND:
        raise InputError(f"{path}: no checkpoint of a PE classifier: give one of ddpm/classifier/train_classifier.py")
    return checkpoint


def classifier_of(checkpoint: Mapping[str, Any], *, ema: bool = True) -> PEClassifier:
    """The classifier in a checkpoint's content, frozen and in evaluation mode."""
    classifier = PEClassifier(ClassifierConfig.from_dict(checkpoint["classifier"]))
    state = checkpoint["state_dict"] if ema else checkpoint.get("current_model_state", checkpoint["state_dict"])
    prefix = "classifier."
    classifier.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return classifier.requires_grad_(False).eval()
