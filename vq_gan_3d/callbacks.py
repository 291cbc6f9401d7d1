"""Callbacks every training of this project shares: averaged weights, length in batches, a graceful end, skips."""

from __future__ import annotations

import logging
import signal
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, WeightAveraging
from torch import Tensor

from errors import ExitCode, InputError, TerminatedError
from vq_gan_3d.distributed import gather_objects, world_size
from vq_gan_3d.optimization import steps_of

log = logging.getLogger(__name__)


class ExponentialMovingAverage(WeightAveraging):
    """EMA of the parameters, used in validation; raw weights stay the ones that train.

    Lightning's callback averages buffers by default and overwrites the raw weights when training ends. Codebook
    buffers are no weights: they are copied live. And a run must be able to go on from its final checkpoint: so
    checkpoints keep the average as ``state_dict`` and the raw weights as ``current_model_state``.

    Args:
        decay: limit of the decay; early on it is (1 + n) / (10 + n), so that the start is forgotten quickly.
    """

    def __init__(self, decay: float) -> None:
        def average(averaged: list[Tensor], current: list[Tensor], updates: Tensor | int) -> None:
            n = int(updates)
            torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))

        super().__init__(use_buffers=False, multi_avg_fn=average)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the raw weights alone (Lightning would overwrite them)."""

    def _take_buffers(self, pl_module: pl.LightningModule) -> None:
        """Give the average the live buffers; without a step (non-finite gradients) it still has those of before."""
        assert self._average_model is not None
        for ours, live in zip(self._average_model.module.buffers(), pl_module.buffers(), strict=True):
            ours.copy_(live)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swap in the average; its buffers, the count of steps among them, are the live ones."""
        self._take_buffers(pl_module)
        super().on_validation_epoch_start(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store average and raw weights; buffers of the average are the live ones."""
        self._take_buffers(pl_module)
        super().on_save_checkpoint(trainer, pl_module, checkpoint)


class StopAfterSteps(Callback):
    """End training after a number of batches, counted by the module itself.

    Lightning's ``max_steps`` counts the steps of every optimizer and runs half as far with two.
    """

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps

    def _check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if steps_of(pl_module) >= self.max_steps:
            trainer.should_stop = True
            trainer.check_val_every_n_epoch = 1  # the end is validated, whatever the epoch

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run resumed at its end does not train one more batch."""
        self._check(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Stop once enough batches were seen."""
        self._check(trainer, pl_module)


class InterruptedRunError(TerminatedError):
    """SIGINT arrived. No KeyboardInterrupt: Lightning turns that into exit code 1."""

    exit_code = ExitCode.SIGINT


class GracefulStop(Callback):
    """SIGTERM and the first SIGINT end the run at the next step boundary, after a checkpoint was saved.

    A second SIGTERM changes nothing (schedulers repeat it); a second SIGINT interrupts at once. Under DDP a signal to
    any rank stops all of them at the same step.
    """

    def __init__(self) -> None:
        self.signal_number = 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal_number == signal.SIGINT:
            raise InterruptedRunError("interrupted by a second SIGINT: steps since the last checkpoint are lost")
        self.signal_number = number

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over both signals, Lightning's handler included (it exits 0 without a checkpoint).

        They are ours until the final checkpoint is written: Lightning's teardown puts back all handlers of before.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def requested(self, device: torch.device) -> bool:
        """Whether any rank was told to stop; a collective, so call it on all ranks at the same point."""
        if world_size() == 1:
            return self.signal_number != 0
        flag = torch.tensor(self.signal_number, device=device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        self.signal_number = int(flag)
        return self.signal_number != 0

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Cut validation short; the loop ends as if the data were used up, and weights are swapped back."""
        if self.signal_number and not trainer.sanity_checking:
            raise StopIteration

    def error(self, checkpoint: str) -> BaseException:
        """What to raise after the checkpoint was saved."""
        interrupted = self.signal_number == signal.SIGINT
        kind, name = (InterruptedRunError, "SIGINT") if interrupted else (TerminatedError, "SIGTERM")
        return kind(f"stopped by {name}, saved {checkpoint}: resume with ckpt_path=last")


class SkipLedger(Callback):
    """Keeps account of samples that could not be read and were replaced, on all ranks and across restarts.

    Args:
        total: number of samples of the training set.
        max_fraction: share of it that may fail; more ends the run, since the data is not what it should be.
        known: samples that failed before training, by name.
    """

    def __init__(self, total: int, max_fraction: float, known: dict[str, str]) -> None:
        self.total = total
        self.max_fraction = max_fraction
        self.reasons: dict[str, str] = {}
        self.validation_batch: int | None = None  # the one that validation waits for
        for name, reason in known.items():
            self.add(name, reason)

    def add(self, name: str, reason: str) -> None:
        """Record one bad sample.

        Raises:
            InputError: now there are too many.
        """
        self._record(name, reason)
        if len(self.reasons) > self.max_fraction * self.total:
            raise InputError(
                f"{len(self.reasons)} of {self.total} samples cannot be read, more than dataset.max_bad_fraction="
                f"{self.max_fraction}; the last: {reason}"
            )

    def _record(self, name: str, reason: str) -> None:
        if name not in self.reasons:
            self.reasons[name] = reason
            log.warning("skipped %s", reason)

    def _share(self) -> None:
        """Learn what other ranks skipped, so that the first can tell; a collective."""
        for reasons in gather_objects(self.reasons):
            for name, reason in reasons.items():
                self._record(name, reason)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the account: a resumed run ends with what it skipped before (all ranks come here)."""
        self._share()
        checkpoint["skipped"] = dict(self.reasons)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on with the account."""
        for name, reason in checkpoint.get("skipped", {}).items():
            self._record(name, reason)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring together what all ranks skipped.

        Raises:
            InputError: together they are too many.
        """
        self._share()
        for name, reason in self.reasons.items():
            self.add(name, reason)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        """Collect what the workers reported with the batch."""
        for name, reason in batch["skipped"]:
            self.add(name, reason)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: dict[str, Any], *args: Any
    ) -> None:
        """The same for held-out volumes: one that cannot be read makes the metrics count another one twice."""
        self.validation_batch = args[0] + 1
        for name, reason in batch["skipped"]:
            self.add(name, reason)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on held-out volumes are loaded."""
        self.validation_batch = 0

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """And from here on training samples."""
        self.validation_batch = None
