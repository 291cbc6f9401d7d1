"""What a run leaves to look at: a text log, CSV tables, panels on three planes, histograms of code use."""

from __future__ import annotations

import csv
import io
import logging
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import TensorBoardLogger

from dataset.atomic import atomic_write
from evaluation.panels import save_panel
from vq_gan_3d.callbacks import GracefulStop
from vq_gan_3d.optimization import steps_of
from vq_gan_3d.stage import TrainedModule


def log_to_file(path: Path) -> None:
    """Send the project's messages to a file as well as to the terminal, appending: a resumed run goes on there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    # Hydra's `job_logging: disabled` disables every logger that exists already, ours among them
    for logger in logging.Logger.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.disabled = False
    logging.raiseExceptions = False  # a full disk ends the run by its checkpoints, not by tracebacks of the log
    file = logging.FileHandler(path)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    terminal = logging.StreamHandler()
    terminal.setFormatter(logging.Formatter("%(message)s"))
    root.addHandler(file)
    root.addHandler(terminal)
    # Lightning announces devices and products there; its warnings pass, and the table of `profiler`
    lightning = logging.getLogger("pytorch_lightning")
    lightning.setLevel(logging.WARNING)
    logging.getLogger("pytorch_lightning.profilers").setLevel(logging.INFO)
    for handler in list(lightning.handlers):  # its own, which keeps messages from ours and from the file
        lightning.removeHandler(handler)
    lightning.propagate = True


class LearningRateLog(Callback):
    """Logs ``train/lr``: the learning rate of the last optimizer step, which all optimizers share."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """After each batch."""
        pl_module.log("train/lr", trainer.optimizers[0].param_groups[0]["lr"])


class CsvLog(Callback):
    """Appends training scalars to ``train.csv`` and validation metrics to ``validation.csv``, one row a step.

    Columns that appear later (the adversarial terms) start a new header by rewriting the file; a resumed run drops what
    lies beyond its checkpoint and appends.

    Args:
        folder: where the tables go.
        every_n_steps: batches between rows of ``train.csv``.
        graceful_stop: told to stop, validation is cut short, and its metrics are not those of a whole one.
    """

    def __init__(self, folder: Path, every_n_steps: int, graceful_stop: GracefulStop) -> None:
        self.folder = folder
        self.every_n_steps = every_n_steps
        self.graceful_stop = graceful_stop

    def _append(self, table: str, prefix: str, trainer: pl.Trainer, steps: int) -> None:
        if not trainer.is_global_zero:
            return
        row = {"step": f"{steps}", "epoch": f"{trainer.current_epoch}"}
        metrics = trainer.callback_metrics
        row |= {name[len(prefix) :]: f"{float(metrics[name]):.6g}" for name in metrics if name.startswith(prefix)}
        path = self.folder / table
        columns = _columns(path)
        if set(row) <= set(columns):
            with path.open("a", newline="") as file:
                csv.DictWriter(file, columns, restval="").writerow(row)
        else:
            old = _rows(path) if columns else []
            _rewrite(path, columns + [name for name in row if name not in columns], [*old, row])

    def _forget(self, table: str, from_step: int) -> None:
        """Drop rows of a run that was killed after its last checkpoint: its steps are taken again."""
        path = self.folder / table
        if columns := _columns(path):
            rows = _rows(path)
            # a row that a kill cut short has no step or too few cells
            kept = [row for row in rows if None not in row.values() and int(row["step"] or from_step) < from_step]
            if len(kept) < len(rows):
                _rewrite(path, columns, kept)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A resumed run goes on where its checkpoint was."""
        if trainer.is_global_zero:
            for table in ("train.csv", "validation.csv"):
                self._forget(table, steps_of(pl_module) + 1)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """One row of training scalars, now and then."""
        if steps_of(pl_module) % self.every_n_steps == 0:
            self._append("train.csv", "train/", trainer, steps_of(pl_module))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """One row of validation metrics; of a validation that is repeated after a resume, the last counts."""
        if not trainer.sanity_checking and not self.graceful_stop.signal_number:
            if trainer.is_global_zero:
                self._forget("validation.csv", steps_of(pl_module))
            self._append("validation.csv", "val/", trainer, steps_of(pl_module))


def _columns(path: Path) -> list[str]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file).fieldnames or [])


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _rewrite(path: Path, columns: list[str], rows: list[dict[str, str]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(path) as handle:
        handle.write(text.getvalue().encode())


class PanelLog(Callback):
    """Panels of the first held-out volumes, and distributions over all: whatever the module offers to draw.

    They go to TensorBoard and, as PNG, to a folder.

    Args:
        folder: for the PNG files.
        volumes: how many held-out volumes are shown, each by its first batch.
    """

    def __init__(self, folder: Path, volumes: int) -> None:
        self.folder = folder
        self.volumes = volumes
        self._shown: set[str] = set()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing of this validation is drawn yet."""
        self._shown = set()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw one volume."""
        name = batch["name"][0]
        if not trainer.is_global_zero or name in self._shown or len(self._shown) >= self.volumes:
            return
        image = cast(TrainedModule, pl_module).panel(batch, outputs)
        if image is None:
            return
        self._shown.add(name)
        steps = steps_of(pl_module)
        save_panel(image, self.folder / f"step_{steps:04d}_{name}.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(f"val/{name}", image, steps, dataformats="HWC")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Histograms over the whole validation set."""
        for name, values in cast(TrainedModule, pl_module).histograms().items():
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                    logger.experiment.add_histogram(name, values, steps_of(pl_module))
