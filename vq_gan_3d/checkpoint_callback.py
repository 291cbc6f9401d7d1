"""When checkpoints are written, under which names, and which of them stay."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins import CheckpointIO
from pytorch_lightning.callbacks import Checkpoint

from vq_gan_3d.callbacks import GracefulStop
from vq_gan_3d.checkpointing import copy_checkpoint, load_checkpoint, save_checkpoint
from vq_gan_3d.optimization import steps_of
from vq_gan_3d.stage import Monitor

log = logging.getLogger(__name__)


class VerifiedCheckpointIO(CheckpointIO):
    """Lightning's checkpoint traffic through our atomic, verified files."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write atomically, with a checksum."""
        save_checkpoint(Path(path), checkpoint)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Verify, then load tensors and plain containers only."""
        return load_checkpoint(Path(path), map_location or "cpu")

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint that is no longer wanted."""
        Path(path).unlink(missing_ok=True)


class CheckpointKeeper(Checkpoint):
    """Writes ``epoch_05_step_0100.ckpt``, ``last.ckpt``, ``best.ckpt`` and ``final.ckpt``.

    Everything is saved at the boundary of an optimizer step, so that resuming repeats no gradient and loses none.
    Names hold neither ``=`` nor ``/``: both break ``ckpt_path=`` on a command line.

    Args:
        folder: where they go.
        every_n_epochs: a named checkpoint at the end of every n-th epoch; all of these are kept.
        every_n_steps: one every n batches besides; 0 for none.
        keep_step_checkpoints: how many of the latter are kept.
        accumulate: batches per optimizer step.
        graceful_stop: told to stop, the run saves here and ends.
        monitor: the validation metric that decides ``best.ckpt``.
    """

    def __init__(
        self,
        folder: Path,
        every_n_epochs: int,
        every_n_steps: int,
        keep_step_checkpoints: int,
        accumulate: int,
        graceful_stop: GracefulStop,
        monitor: Monitor,
    ) -> None:
        self.folder = folder
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.keep_step_checkpoints = keep_step_checkpoints
        self.accumulate = accumulate
        self.graceful_stop = graceful_stop
        self.monitor = monitor
        self.best = monitor.worst()
        self._due = False
        self._step_files: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart."""
        return {"best": self.best, "step_files": list(self._step_files)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore."""
        self.best = state_dict["best"]
        self._step_files = list(state_dict["step_files"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Where no ``best.ckpt`` is, since the run began elsewhere or was taken back, the next validation makes one."""
        if trainer.is_global_zero and not (self.folder / "best.ckpt").exists():
            self.best = self.monitor.worst()
        self.best = trainer.strategy.broadcast(self.best)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write every checkpoint as if it were saved right after its last batch.

        Lightning resumes differently from checkpoints of a batch's end, of a validation's and of training's, and
        repeats or leaves out batches after some of them. Where we are follows from the number of batches alone.
        """
        steps, batches = steps_of(pl_module), int(trainer.num_training_batches)
        if steps == 0:
            return
        epoch, done = divmod(steps - 1, batches)
        done += 1
        checkpoint["epoch"] = epoch
        loop = checkpoint["loops"]["fit_loop"]
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] = steps - 1
        loop["epoch_loop.batch_progress"] = {
            "total": {"ready": steps, "started": steps, "processed": steps, "completed": steps - 1},
            "current": {"ready": done, "started": done, "processed": done, "completed": done - 1},
            "is_last_batch": done == batches,
        }
        epochs = {"ready": epoch + 1, "started": epoch + 1, "processed": epoch, "completed": epoch}
        loop["epoch_progress"] = {"total": epochs, "current": dict(epochs)}
        none = {"ready": 0, "started": 0, "processed": 0, "completed": 0}
        loop["epoch_loop.val_loop.batch_progress"] = {"total": none, "current": dict(none), "is_last_batch": False}

    def _save_numbered(self, trainer: pl.Trainer, steps: int, keep: bool) -> Path:
        epoch = trainer.current_epoch + 1 if trainer.is_last_batch else trainer.current_epoch
        path = self.folder / f"epoch_{epoch:02d}_step_{steps:04d}.ckpt"
        # a signal in the validation after a save saves the same step again
        if not keep and path.name not in self._step_files:
            self._step_files.append(path.name)
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            copy_checkpoint(path, self.folder / "last.ckpt")
            log.info("saved %s", path)
            while len(self._step_files) > self.keep_step_checkpoints:
                (self.folder / self._step_files.pop(0)).unlink(missing_ok=True)
        return path

    def _ends_due_epoch(self, trainer: pl.Trainer) -> bool:
        """Whether we stand at the end of an epoch whose checkpoint stays."""
        return trainer.is_last_batch and (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Save what is due, at the next boundary of an optimizer step."""
        steps = steps_of(pl_module)
        end_of_epoch = self._ends_due_epoch(trainer)
        self._due |= end_of_epoch or (self.every_n_steps > 0 and steps % self.every_n_steps == 0)
        if steps % self.accumulate:
            return
        stop = self.graceful_stop.requested(pl_module.device)
        if self._due or stop:
            self._due = False
            path = self._save_numbered(trainer, steps, keep=end_of_epoch)
            if stop:
                raise self.graceful_stop.error(str(path))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the best so far; a validation that was cut short decides nothing."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.graceful_stop.requested(pl_module.device):
            path = self._save_numbered(trainer, steps_of(pl_module), keep=self._ends_due_epoch(trainer))
            raise self.graceful_stop.error(str(path))
        score = trainer.callback_metrics.get(self.monitor.name)
        if score is not None and self.monitor.beats(float(score), self.best):
            self.best = float(score)
            trainer.save_checkpoint(self.folder / "best.ckpt")
            log.info("saved %s (%s %.3f)", self.folder / "best.ckpt", self.monitor.name, self.best)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the end, raw and averaged weights alike, so that a longer run can go on from here."""
        trainer.save_checkpoint(self.folder / "final.ckpt")
        if trainer.is_global_zero:
            copy_checkpoint(self.folder / "final.ckpt", self.folder / "last.ckpt")
            log.info("saved %s", self.folder / "final.ckpt")
