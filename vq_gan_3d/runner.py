"""From a composed configuration to a finished run: the one place where a Trainer is built."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback, TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger

from dataset.atomic import atomic_write
from dataset.data_module import VolumeDataModule
from dataset.intensity import HUWindow
from dataset.sources import PhantomSource, VolumeSource, default_cache, find_nifti
from errors import (
    ConfigurationError,
    DivergedError,
    ExitCode,
    InputError,
    MemoryExhaustedError,
    StorageError,
    one_line,
)
from vq_gan_3d.callbacks import ExponentialMovingAverage, GracefulStop, SkipLedger, StopAfterSteps
from vq_gan_3d.checkpoint_callback import CheckpointKeeper, VerifiedCheckpointIO
from vq_gan_3d.checkpointing import find_resumable, is_writable, load_checkpoint, newest_first
from vq_gan_3d.codec import CodecConfig
from vq_gan_3d.hardware import Hardware, resolve_hardware, return_memory_early
from vq_gan_3d.logs import CsvLog, PanelLog, log_to_file
from vq_gan_3d.vqgan import VQGAN, LossConfig, OptimizerConfig

log = logging.getLogger(__name__)
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}


def data_module(config: DictConfig) -> VolumeDataModule:
    """The data that ``dataset.*`` and ``training.*`` describe."""
    d, t = config.dataset, config.training
    size = _size(d.size)
    sources: list[VolumeSource] = []
    if d.name == "nifti" or d.root_dir:
        sources += find_nifti(d.root_dir)
    else:
        grid = _size(d.phantom_size) or size
        if grid is None:
            raise ConfigurationError("dataset=phantom needs dataset.size or dataset.phantom_size as [D, H, W]")
        sources += [PhantomSource(seed, grid) for seed in range(d.first_seed, d.first_seed + d.n_patients)]
        log.info("data: phantom thoraces; your own: dataset=nifti dataset.root_dir=/folder/of/nii.gz")
    if size is None and d.patch_size is None:
        raise ConfigurationError("dataset.size=null keeps native grids: set dataset.patch_size to train on patches")
    return VolumeDataModule(
        sources,
        size_dhw=size,
        patch_dhw=_size(d.patch_size),
        patches_per_volume=d.patches_per_volume,
        validation_fraction=d.validation_fraction,
        validation=list(d.validation),
        cache=Path(d.cache_dir) if d.cache_dir else default_cache(),
        batch_size=t.batch_size,
        num_workers=t.num_workers,
        worker_timeout_s=t.worker_timeout_s,
        seed=t.seed,
        max_bad_fraction=d.max_bad_fraction,
    )


def _size(value: Any) -> tuple[int, int, int] | None:
    if value is None:
        return None
    if len(value) != 3 or min(value) < 1:
        raise ConfigurationError(f"size {list(value)} is no [D, H, W] of positive integers")
    return int(value[0]), int(value[1]), int(value[2])


def build_module(config: DictConfig) -> VQGAN:
    """The module that ``model.*`` and ``training.*`` describe."""
    model, t = _plain(config.model), _plain(config.training)
    codec_keys, loss_keys = CodecConfig.__dataclass_fields__, LossConfig.__dataclass_fields__
    codec = CodecConfig.from_dict({key: value for key, value in model.items() if key in codec_keys})
    losses = LossConfig(**{key: value for key, value in model.items() if key in loss_keys})
    t["betas"] = tuple(t["betas"])
    optimizer = OptimizerConfig(**{key: t[key] for key in OptimizerConfig.__dataclass_fields__})
    window = HUWindow(config.dataset.hu_min, config.dataset.hu_max)
    torch.manual_seed(t["seed"])
    return VQGAN(codec, losses, optimizer, window, config.hardware.checkpointing)


def _plain(config: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


class ResumeContract(Callback):
    """What must not change between a run and its continuation; stored in every checkpoint.

    Args:
        config: of this run.
        manifest: hash of the cohort.
        world_size: number of processes; the global batch counts, not how it is spread.
    """

    def __init__(self, config: DictConfig, manifest: str, world_size: int) -> None:
        t, d = config.training, config.dataset
        self.values = {
            "training.seed": t.seed,
            "training.batch_size × processes": t.batch_size * world_size,
            "training.accumulate_grad_batches": t.accumulate_grad_batches,
            "dataset (volumes)": manifest,
            "dataset.size": _size(d.size) and list(_size(d.size) or ()),
            "dataset.patch_size": _size(d.patch_size) and list(_size(d.patch_size) or ()),
            "dataset.patches_per_volume": d.patches_per_volume,
            "dataset.hu_min": d.hu_min,
            "dataset.hu_max": d.hu_max,
        } | {f"model.{key}": value for key, value in _plain(config.model).items()}

    def check(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Refuse a checkpoint of another run.

        Raises:
            ConfigurationError: listing the keys that differ.
        """
        theirs = checkpoint.get("resume_contract")
        if theirs is None:
            raise InputError(f"{path}: no training checkpoint of this project")
        differing = [
            f"{key} ({theirs.get(key)} there, {self.values.get(key)} here)"
            for key in self.values | theirs
            if theirs.get(key) != self.values.get(key)
        ]
        if differing:
            raise ConfigurationError(f"{path} cannot be resumed with other settings: {'; '.join(differing)}")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the contract."""
        checkpoint["resume_contract"] = self.values


def find_start(config: DictConfig, checkpoints: Path) -> Path | None:
    """The checkpoint to resume from, or None for a fresh start.

    Raises:
        ConfigurationError: the folder holds a run already, and neither resuming nor overwriting was asked for.
        InputError: the checkpoint is missing or damaged, as are all others.
    """
    if config.ckpt_path is None:
        existing = newest_first(checkpoints)
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


def train(config: DictConfig) -> int:
    """Train the first stage as configured; returns the exit code.

    Raises:
        ProjectError: see its subclasses for what can go wrong, each with an exit code of its own.
    """
    output = Path(config.output_dir).expanduser()
    try:
        return _train(config, output)
    except OSError as error:  # logs, panels and TensorBoard, which write by themselves
        path = Path(error.filename) if isinstance(error.filename, str) else output
        if error.errno in _DISK_ERRORS or (error.filename and path.resolve().is_relative_to(output.resolve())):
            raise StorageError(
                f"{path}: not written, {error.strerror}: free space there or choose another output_dir"
            ) from error
        raise


def _train(config: DictConfig, output: Path) -> int:
    checkpoints = output / "checkpoints"
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0  # other processes start later, when files exist already
    is_writable(checkpoints)
    if first:
        log_to_file(output / "logs" / "training.log")
    start = find_start(config, checkpoints) if first else _start_of_first_process()
    if first:
        os.environ["XRAY2CTPA_RESUME"] = str(start or "")
    hardware = resolve_hardware(config.hardware)
    if config.hardware.checkpointing and hardware.accelerator == "cpu":
        return_memory_early()
    data = data_module(config)
    module = build_module(config)
    contract = ResumeContract(config, data.manifest, hardware.world_size)
    steps = 0
    if start is not None:
        checkpoint = load_checkpoint(start)
        contract.check(checkpoint, start)
        steps = int(checkpoint["current_model_state"]["steps"])
        log.info("resuming from %s at step %d", start, steps)
    rank = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))
    sampler = data.build(rank, hardware.world_size)
    sampler.resume_at(steps)
    module.total_steps = _total_steps(config, sampler.batches)
    if first:
        describe(module, data, hardware, module.total_steps)
        if start is None:  # overwrite=true: now that nothing is left to be refused
            for path in [*newest_first(checkpoints), *(output / "logs").glob("*.csv")]:
                path.unlink()
        with atomic_write(output / "config.yaml") as handle:
            handle.write(OmegaConf.to_yaml(config, resolve=True).encode())
    if hardware.compile:
        module.codec.encoder.compile()
        module.codec.decoder.compile()
    ledger = SkipLedger(sum(map(len, data.sources.values())), config.dataset.max_bad_fraction, data.bad)
    trainer = build_trainer(config, hardware, output, [contract, ledger], module.total_steps)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*dataloader is not resumable.*")
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
        warnings.filterwarnings("ignore", ".*LeafSpec.*")
        _fit(trainer, module, data, start, ledger)
    log.info("done: checkpoints in %s, panels in %s", checkpoints, output / "validation_results")
    return ExitCode.SKIPS if ledger.reasons else ExitCode.OK


def _start_of_first_process() -> Path | None:
    path = os.environ.get("XRAY2CTPA_RESUME", "")
    return Path(path) if path else None


def _total_steps(config: DictConfig, batches_per_epoch: int) -> int:
    t = config.training
    steps = batches_per_epoch * t.num_epochs
    if t.max_steps >= 0:
        if t.max_steps % t.accumulate_grad_batches:
            raise ConfigurationError(
                f"training.max_steps={t.max_steps} is no multiple of training.accumulate_grad_batches="
                f"{t.accumulate_grad_batches}: the last optimizer step would be incomplete"
            )
        steps = min(steps, t.max_steps)
    return steps


def build_trainer(
    config: DictConfig, hardware: Hardware, output: Path, callbacks: list[Callback], total_steps: int
) -> pl.Trainer:
    """The Trainer: our checkpoints, our signals, our logs; Lightning's loops, strategies and precision."""
    t, c = config.training, config.callbacks
    stop = GracefulStop()
    keeper = CheckpointKeeper(
        output / "checkpoints",
        t.checkpoint_every_n_epochs,
        t.checkpoint_every_n_steps,
        c.keep_step_checkpoints,
        t.accumulate_grad_batches,
        stop,
    )
    panels = output / "validation_results"
    panels.mkdir(parents=True, exist_ok=True)
    callbacks = [
        ExponentialMovingAverage(t.ema_decay),
        *callbacks,
        StopAfterSteps(total_steps),
        stop,
        CsvLog(output / "logs", config.logger.every_n_steps, stop),
        PanelLog(panels, c.panel_volumes),
        keeper,
    ]
    if c.progress_bar:
        callbacks.append(TQDMProgressBar(refresh_rate=1))
    logger = TensorBoardLogger(output, name="tensorboard_logs", version="") if config.logger.tensorboard else False
    return pl.Trainer(
        **hardware.trainer_arguments(),
        max_epochs=t.num_epochs,
        callbacks=callbacks,
        logger=logger,
        plugins=[VerifiedCheckpointIO()],
        check_val_every_n_epoch=t.validate_every_n_epochs,
        log_every_n_steps=config.logger.every_n_steps,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_progress_bar=c.progress_bar,
        enable_model_summary=False,
        enable_checkpointing=True,
        profiler=config.profiler,
        default_root_dir=output,
    )


def _fit(trainer: pl.Trainer, module: VQGAN, data: VolumeDataModule, start: Path | None, ledger: SkipLedger) -> None:
    """``trainer.fit`` with the errors of workers and memory told in one line."""
    try:
        trainer.fit(module, datamodule=data, ckpt_path=start, weights_only=True)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise MemoryExhaustedError(
            f"out of memory at step {int(module.steps)}: lower training.batch_size or dataset.patch_size, or set "
            "hardware.checkpointing=true"
        ) from error
    except DivergedError as error:
        last = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        resume = f"and resume from {last} with ckpt_path=last, it is sound" if last.exists() else "and start again"
        raise DivergedError(f"{error} {resume}") from error
    except SystemExit as error:  # Lightning's answer to a Ctrl-C before our own handler stands
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    except Exception as error:
        if "DataLoader" not in str(error):
            raise
        for worker in multiprocessing.active_children():  # one that hangs would also hang our exit
            worker.kill()
        raise InputError(_blame_worker(data, int(module.steps), ledger.validation_batch, str(error))) from error


def _blame_worker(data: VolumeDataModule, steps: int, validation_batch: int | None, message: str) -> str:
    """One line that names what a failed worker was busy with."""
    if "DataLoader worker process" in message:  # it raised; the last line of its traceback names the sample
        return one_line(message.strip().splitlines()[-1].removeprefix("errors.InputError: "))
    if validation_batch is not None:
        names = data.names_of_validation()[validation_batch : validation_batch + data.batches_in_flight]
        where = "validation"
    else:
        names, where = data.names_of_training(steps), f"step {steps}"
    hint = "see whether it can be read at all, or raise training.worker_timeout_s"
    if "timed out" not in message:
        hint = "out of memory? lower training.num_workers"
    return f"a data worker failed in {where} on one of {', '.join(names)} ({one_line(message)}): {hint}"


def describe(module: VQGAN, data: VolumeDataModule, hardware: Hardware, steps: int) -> None:
    """Say what is about to be trained, on what, with how many parameters in each part."""
    training, held_out = (len(data.datasets[split].volumes) for split in ("training", "validation"))
    log.info("volumes: %d for training, %d held out; %d steps", training, held_out, steps)
    log.info("hardware: %s", hardware)
    for part, count in module.parameters_by_part().items():
        log.info("parameters: %-32s %7.2f M", part, count / 1e6)
    encoder, decoder = module.codec.config.receptive_halo_vox()
    log.info("receptive halo [D, H, W] in voxels: encoder %s, decoder %s", list(encoder), list(decoder))
