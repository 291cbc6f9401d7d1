"""What a run leaves to look at: a text log, CSV tables, panels on three planes, histograms of code use."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import TensorBoardLogger

from dataset.geometry import spacing_mm
from evaluation.panels import panel_image, save_panel
from params import MEDIASTINUM_WINDOW
from vq_gan_3d.callbacks import GracefulStop
from vq_gan_3d.optimization import steps_of
from vq_gan_3d.vqgan import VQGAN


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
    # Lightning announces devices and products there; its warnings pass
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)


class CsvLog(Callback):
    """Appends training scalars to ``train.csv`` and validation metrics to ``validation.csv``, one row a step.

    Columns that appear later (the adversarial terms) start a new header by rewriting the file; a resumed run appends.

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
        old: list[dict[str, str]] = []
        columns = list(row)
        if path.exists():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                known = list(reader.fieldnames or [])
                if set(row) <= set(known):
                    columns = known
                else:
                    old, columns = list(reader), known + [name for name in row if name not in known]
        fresh = not path.exists() or bool(old) or columns != (known if path.exists() else [])
        with path.open("w" if fresh else "a", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            if fresh:
                writer.writeheader()
                writer.writerows(old)
            writer.writerow(row)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """One row of training scalars, now and then."""
        if steps_of(pl_module) % self.every_n_steps == 0:
            self._append("train.csv", "train/", trainer, steps_of(pl_module))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """One row of validation metrics."""
        if not trainer.sanity_checking and not self.graceful_stop.signal_number:
            self._append("validation.csv", "val/", trainer, steps_of(pl_module))


class PanelLog(Callback):
    """Panels (original, reconstruction, error; three planes) of the first held-out volumes, and code use.

    They go to TensorBoard and, as PNG, to a folder.

    Args:
        folder: for the PNG files.
        volumes: how many held-out volumes are shown.
    """

    def __init__(self, folder: Path, volumes: int) -> None:
        self.folder = folder
        self.volumes = volumes

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
        assert isinstance(pl_module, VQGAN)
        if not trainer.is_global_zero or batch_idx >= self.volumes:
            return
        original = pl_module.window.to_hu(pl_module.window.to_unit(batch["hu"][0, 0])).cpu().numpy()
        reconstruction = pl_module.window.to_hu(outputs[0, 0]).cpu().numpy()
        image = panel_image(
            original, reconstruction, spacing_mm(batch["affine"][0].cpu().numpy()), window=MEDIASTINUM_WINDOW
        )
        steps = steps_of(pl_module)
        save_panel(image, self.folder / f"step_{steps:04d}_{batch['name'][0]}.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(f"val/{batch['name'][0]}", image, steps, dataformats="HWC")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Histogram of code use over the whole validation set."""
        assert isinstance(pl_module, VQGAN)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero and pl_module.usage.counts.any():
                share = pl_module.usage.counts.double() / pl_module.usage.counts.sum()
                logger.experiment.add_histogram("val/code_share", share, steps_of(pl_module))
