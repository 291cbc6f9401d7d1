"""From a composed configuration to a finished run, for every trainer: the one place where a Trainer is built."""

from __future__ import annotations

import errno
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback, TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger

from dataset.atomic import atomic_write
from dataset.from_config import recorded
from errors import (
    ConfigurationError,
    DivergedError,
    ExitCode,
    InputError,
    MemoryExhaustedError,
    StorageError,
    is_out_of_memory,
)
from vq_gan_3d.callbacks import ExponentialMovingAverage, GracefulStop, SkipLedger, StopAfterSteps
from vq_gan_3d.checkpoint_callback import CheckpointKeeper, VerifiedCheckpointIO
from vq_gan_3d.checkpointing import is_writable, load_checkpoint
from vq_gan_3d.hardware import Hardware, compile_parts, resolve_hardware, return_memory_early
from vq_gan_3d.launch import Launch, find_launch
from vq_gan_3d.logs import CsvLog, LearningRateLog, PanelLog, log_to_file
from vq_gan_3d.optimization import OptimizerConfig, steps_of
from vq_gan_3d.resume import ResumeContract, Rewind, find_start, forget_run
from vq_gan_3d.settings import require_number, require_whole
from vq_gan_3d.stage import Stage, TrainingData
from vq_gan_3d.workers import blame_worker, stop_workers

log = logging.getLogger(__name__)
_LEAST = {
    "training.batch_size": 1,
    "training.num_epochs": 1,
    "training.max_steps": -1,
    "training.num_workers": 0,
    "training.checkpoint_every_n_epochs": 1,
    "training.checkpoint_every_n_steps": 0,
    "training.validate_every_n_epochs": 1,
    "callbacks.keep_step_checkpoints": 0,
    "callbacks.panel_volumes": 0,
    "logger.every_n_steps": 1,
    "hardware.processes": 1,
    "hardware.num_nodes": 1,
}
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}


def train_stage(config: DictConfig, stage: Stage) -> int:
    """Train as configured; returns the exit code.

    Args:
        config: composed by ``command.run_training``.
        stage: what is trained.

    Raises:
        ProjectError: see its subclasses for what can go wrong, each with an exit code of its own.
    """
    output = Path(config.output_dir).expanduser()
    try:
        return _train(config, stage, output)
    except OSError as error:  # logs, panels and TensorBoard, which write by themselves
        path = Path(error.filename) if isinstance(error.filename, str) else output
        if error.errno in _DISK_ERRORS or (error.filename and path.resolve().is_relative_to(output.resolve())):
            raise StorageError(
                f"{path}: not written, {error.strerror}: free space there or choose another output_dir"
            ) from error
        raise


def _train(config: DictConfig, stage: Stage, output: Path) -> int:
    checkpoints = output / "checkpoints"
    _check_counts(config)
    hardware = resolve_hardware(config.hardware)
    launch = find_launch(os.environ, hardware.per_node, hardware.num_nodes)
    first = launch.rank == 0  # one process of all machines; Lightning starts the others later, torchrun at once
    is_writable(checkpoints)
    if first:
        log_to_file(output / "logs" / "training.log")
    start = find_start(config, checkpoints) if first else _start_of_others(config, checkpoints)
    if first:
        os.environ["XRAY2CTPA_RESUME"] = str(start or "")
    if config.hardware.checkpointing and hardware.accelerator == "cpu":
        return_memory_early()
    data = stage.build_data(config)
    contract = ResumeContract(config, data.manifest, hardware.world_size, stage.contract(config))
    steps = 0 if start is None else _steps_at(start, contract)
    sampler = data.build(launch.rank, launch.world_size)
    sampler.keep_whole_windows(config.training.accumulate_grad_batches)
    sampler.resume_at(steps)
    module: Any = stage.build_module(config, data)
    module.total_steps = _total_steps(config, sampler.batches)
    if first:
        _describe(stage, module, data, hardware)
        if start is None:  # overwrite=true: now that nothing is left to be refused
            forget_run(output)
        with atomic_write(output / "config.yaml") as handle:
            handle.write(recorded(config).encode())
    if hardware.compile:
        compile_parts(stage.to_compile(module))
    ledger = SkipLedger(sum(map(len, data.sources.values())), config.dataset.max_bad_fraction, data.bad)
    callbacks: list[Callback] = [contract, ledger]
    if start is not None and str(config.ckpt_path) != "last":
        callbacks.append(Rewind(checkpoints, start))
    trainer = build_trainer(config, stage, hardware, launch, output, callbacks, module.total_steps)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*dataloader is not resumable.*")
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
        warnings.filterwarnings("ignore", ".*LeafSpec.*")
        _fit(trainer, stage, module, data, start, ledger)
    log.info("done: checkpoints in %s, panels in %s", checkpoints, output / "validation_results")
    return ExitCode.SKIPS if ledger.reasons else ExitCode.OK


def _check_counts(config: DictConfig) -> None:
    """Refuse counts, intervals and settings of the optimizers that are none, by name, before anything is prepared.

    Raises:
        ConfigurationError: one is no number, or below its least.
    """
    for key, least in _LEAST.items():
        require_whole(key, OmegaConf.select(config, key), least)
    for key in ("training.ema_decay", "training.worker_timeout_s"):
        require_number(key, OmegaConf.select(config, key))
    OptimizerConfig.from_config(config.training)


def _steps_at(start: Path, contract: ResumeContract) -> int:
    """Batches that a checkpoint of this run was trained on; here ends the use of its content, which is large."""
    checkpoint = load_checkpoint(start)
    contract.check(checkpoint, start)
    steps = int(checkpoint["current_model_state"]["steps"])
    log.info("resuming from %s at step %d", start, steps)
    return steps


def _start_of_others(config: DictConfig, checkpoints: Path) -> Path | None:
    """The checkpoint that the first process found; under torchrun, which hands nothing on, the same search."""
    if "XRAY2CTPA_RESUME" in os.environ:
        path = os.environ["XRAY2CTPA_RESUME"]
        return Path(path) if path else None
    # nothing is written there before all processes have joined
    return None if config.ckpt_path is None else find_start(config, checkpoints)


def _total_steps(config: DictConfig, batches_per_epoch: int) -> int:
    """Batches of the whole run: ``training.max_steps`` if it is given, else those of ``training.num_epochs``."""
    t = config.training
    if t.max_steps < 0:
        return int(batches_per_epoch * t.num_epochs)
    if t.max_steps % t.accumulate_grad_batches:
        raise ConfigurationError(
            f"training.max_steps={t.max_steps} is no multiple of training.accumulate_grad_batches="
            f"{t.accumulate_grad_batches}: the last optimizer step would be incomplete"
        )
    return int(t.max_steps)


def build_trainer(
    config: DictConfig,
    stage: Stage,
    hardware: Hardware,
    launch: Launch,
    output: Path,
    callbacks: list[Callback],
    total_steps: int,
) -> pl.Trainer:
    """The Trainer: our checkpoints, our signals, our logs; Lightning's loops, strategies and precision.

    Raises:
        ConfigurationError: Lightning counts processes otherwise than the data are split.
    """
    t, c = config.training, config.callbacks
    stop = GracefulStop()
    keeper = CheckpointKeeper(
        output / "checkpoints",
        t.checkpoint_every_n_epochs,
        t.checkpoint_every_n_steps,
        c.keep_step_checkpoints,
        t.accumulate_grad_batches,
        stop,
        stage.monitor,
    )
    panels = output / "validation_results"
    panels.mkdir(parents=True, exist_ok=True)
    callbacks = [
        ExponentialMovingAverage(t.ema_decay),
        *callbacks,
        StopAfterSteps(total_steps),
        stop,
        LearningRateLog(),
        CsvLog(output / "logs", config.logger.every_n_steps, stop),
        PanelLog(panels, c.panel_volumes),
        keeper,
    ]
    if c.progress_bar:
        callbacks.append(TQDMProgressBar(refresh_rate=1))
    logger = TensorBoardLogger(output, name="tensorboard_logs", version="") if config.logger.tensorboard else False
    trainer = pl.Trainer(
        **hardware.trainer_arguments(unused_parameters=stage.unused_parameters),
        max_epochs=-1,  # StopAfterSteps alone ends training
        callbacks=callbacks,
        logger=logger,
        plugins=[VerifiedCheckpointIO(), *([launch.cluster] if launch.cluster else [])],
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
    launch.check(trainer)
    return trainer


def _fit(
    trainer: pl.Trainer, stage: Stage, module: pl.LightningModule, data: Any, start: Path | None, ledger: SkipLedger
) -> None:
    """``trainer.fit`` with the errors of workers and memory told in one line."""
    try:
        trainer.fit(module, datamodule=data, ckpt_path=start, weights_only=True)
    except DivergedError as error:
        last = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        resume = f"and resume from {last} with ckpt_path=last, it is sound" if last.exists() else "and start again"
        raise DivergedError(f"{error} {resume}") from error
    except SystemExit as error:  # Lightning's answer to a Ctrl-C before our own handler stands
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryExhaustedError(f"out of memory at step {steps_of(module)}: {stage.memory_hint}") from error
        if "DataLoader" not in str(error):
            raise
        stop_workers()
        raise InputError(blame_worker(data, steps_of(module), ledger.validation_batch, str(error))) from error


def _describe(stage: Stage, module: Any, data: TrainingData, hardware: Hardware) -> None:
    """Say what is about to be trained, on what, with how many parameters in each part."""
    training, held_out = (
        sum(source.name not in data.bad for source in data.sources[split]) for split in ("training", "validation")
    )
    log.info("volumes: %d for training, %d held out; %d steps", training, held_out, module.total_steps)
    log.info("hardware: %s", hardware)
    for part, count in module.parameters_by_part().items():
        log.info("parameters: %-32s %7.2f M", part, count / 1e6)
    for line in stage.facts(module, data):
        log.info("%s", line)
