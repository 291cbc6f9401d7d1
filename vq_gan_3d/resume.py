"""Where a run starts, and what a continuation must not change."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback

from dataset.from_config import plain_dict
from errors import ConfigurationError, InputError
from vq_gan_3d.checkpointing import all_checkpoints, find_resumable, stored_steps
from vq_gan_3d.optimization import steps_of

log = logging.getLogger(__name__)
# What is minimised may change on the way, and where a file lies; what the networks and the codebook are may not.
FREE_MODEL_SETTINGS = {
    "discriminator_loss",
    "discriminator_iter_start",
    "adversarial_weight",
    "adaptive_weight",
    "feature_matching_weight",
    "slices_per_plane",
    "lpips_weight",
    "lpips_weights",
}


class ResumeContract(Callback):
    """What must not change between a run and its continuation; stored in every checkpoint.

    Args:
        config: of this run.
        manifest: hash of the cohort.
        world_size: number of processes; the global batch counts, not how it is spread.
        own: further settings, of this stage alone.
    """

    def __init__(self, config: DictConfig, manifest: str, world_size: int, own: dict[str, Any]) -> None:
        t, d = config.training, config.dataset
        self.values = {
            "training.seed": t.seed,
            "training.batch_size × processes": t.batch_size * world_size,
            "training.accumulate_grad_batches": t.accumulate_grad_batches,
            "dataset (volumes)": manifest,
            "dataset.size": d.size and list(d.size),
            "dataset.hu_min": d.hu_min,
            "dataset.hu_max": d.hu_max,
        }
        model = flat(plain_dict(config.model))
        self.free = {f"model.{key}": model.pop(key) for key in FREE_MODEL_SETTINGS & model.keys()}
        self.values |= {f"model.{key}": value for key, value in model.items()} | own

    def check(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Refuse a checkpoint of another run; name the free settings that change with this one.

        Raises:
            ConfigurationError: listing the keys that differ.
        """
        theirs = checkpoint.get("resume_contract")
        if theirs is None:
            raise InputError(f"{path}: no training checkpoint of this project")
        if differing := _differing(theirs, self.values):
            raise ConfigurationError(f"{path} cannot be resumed with other settings: {'; '.join(differing)}")
        if changed := _differing(checkpoint["free_settings"], self.free):
            log.info("changed from here on: %s", "; ".join(changed))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the contract."""
        checkpoint["resume_contract"] = self.values
        checkpoint["free_settings"] = self.free


def _differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} ({there.get(key)} there, {here.get(key)} here)"
        for key in sorted({*here, *there})
        if there.get(key) != here.get(key)
    ]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key, so that a difference names the one that differs."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return result


class Rewind(Callback):
    """Puts checkpoints of the branch that a run leaves aside: the newest one stays the one that ``last`` goes on from.

    Whoever names a checkpoint to go on from leaves what was trained after it. Nothing is deleted: it goes to
    ``abandoned_from_step_0500`` beside the others, once the run stands where it was told to, and not before.

    Args:
        checkpoints: of this run.
        start: the named checkpoint. One of another folder leaves all that are in ours.
    """

    def __init__(self, checkpoints: Path, start: Path) -> None:
        self.checkpoints = checkpoints
        self.start = start

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Here the whole state is restored, and nothing is saved yet."""
        if not trainer.is_global_zero:
            return
        steps = steps_of(pl_module)
        inside = self.start.resolve().parent == self.checkpoints.resolve()
        ages = {path: stored_steps(path) for path in all_checkpoints(self.checkpoints)}
        # oldest first: if a kill comes between, the newest of the old branch is still the newest
        left = sorted((path for path in ages if not inside or ages[path] > steps), key=ages.__getitem__)
        if not left:
            return
        name = f"abandoned_from_step_{steps:04d}"
        aside = next(
            folder
            for number in itertools.count(1)
            if not (folder := self.checkpoints / (name if number == 1 else f"{name}_{number}")).exists()
        )
        aside.mkdir()
        for path in left:
            path.rename(aside / path.name)
        log.info("going on from %s: %d checkpoint(s) that it leaves moved to %s", self.start, len(left), aside)


def find_start(config: DictConfig, checkpoints: Path) -> Path | None:
    """The checkpoint to resume from, or None for a fresh start.

    Raises:
        ConfigurationError: the folder holds a run already, and neither resuming nor overwriting was asked for.
        InputError: the checkpoint is missing or damaged, as are all others.
    """
    if config.ckpt_path is None:
        existing = all_checkpoints(checkpoints)
        if existing and not config.overwrite:
            raise ConfigurationError(
                f"{checkpoints} holds {len(existing)} checkpoint(s) of an earlier run: resume it with ckpt_path=last, "
                "or start afresh with overwrite=true or another output_dir"
            )
        return None
    if str(config.ckpt_path) == "last":
        path, rejected = find_resumable(checkpoints)
        for reason in rejected:
            log.warning("rejected %s", reason)
        return path
    return Path(config.ckpt_path).expanduser()


def forget_run(output: Path) -> None:
    """Delete what an earlier run left in its folder and a new one would mix with its own; the text log stays."""
    checkpoints = output / "checkpoints"
    abandoned = list(checkpoints.glob("abandoned_from_step_*"))
    of_branches = itertools.chain.from_iterable(map(all_checkpoints, [checkpoints, *abandoned]))
    of_tables = (output / "logs").glob("*.csv")
    of_panels = (output / "validation_results").glob("step_*.png")
    of_tensorboard = (output / "tensorboard_logs").glob("events.out.tfevents.*")
    for path in itertools.chain(of_branches, of_tables, of_panels, of_tensorboard):
        path.unlink()
    for folder in abandoned:
        if not any(folder.iterdir()):  # somebody's notes stay
            folder.rmdir()
