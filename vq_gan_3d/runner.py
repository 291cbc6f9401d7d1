"""From a composed configuration to a finished run: the one place where a Trainer is built."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback, TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger

from dataset.atomic import atomic_write
from dataset.data_module import VolumeDataModule
from dataset.from_config import data_module, plain_dict
from dataset.intensity import HUWindow
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
from vq_gan_3d.checkpointing import is_writable, load_checkpoint, newest_first
from vq_gan_3d.codec import CodecConfig
from vq_gan_3d.hardware import Hardware, resolve_hardware, return_memory_early
from vq_gan_3d.logs import CsvLog, PanelLog, log_to_file
from vq_gan_3d.resume import ResumeContract, find_start
from vq_gan_3d.vqgan import VQGAN, LossConfig, OptimizerConfig

log = logging.getLogger(__name__)
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}


def build_module(config: DictConfig) -> VQGAN:
    """The module that ``model.*`` and ``training.*`` describe."""
    model, t = plain_dict(config.model), plain_dict(config.training)
    codec_keys, loss_keys = CodecConfig.__dataclass_fields__, LossConfig.__dataclass_fields__
    codec = CodecConfig.from_dict({key: value for key, value in model.items() if key in codec_keys})
    losses = LossConfig(**{key: value for key, value in model.items() if key in loss_keys})
    t["betas"] = tuple(t["betas"])
    optimizer = OptimizerConfig(**{key: t[key] for key in OptimizerConfig.__dataclass_fields__})
    window = HUWindow(config.dataset.hu_min, config.dataset.hu_max)
    torch.manual_seed(t["seed"])
    return VQGAN(codec, losses, optimizer, window, config.hardware.checkpointing)


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
