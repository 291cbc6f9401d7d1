"""Manual optimisation: schedule, accumulation, clipping and the guard against non-finite gradients."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from torch import Tensor

from errors import ConfigurationError, DivergedError
from vq_gan_3d.settings import require_number, require_whole

log = logging.getLogger(__name__)
COSINE_FLOOR = 0.05


@dataclass(frozen=True)
class OptimizerConfig:
    """How it is minimised.

    Attributes:
        learning_rate: of every AdamW optimizer; never rescaled by batch size or number of GPUs.
        betas: of AdamW.
        weight_decay: of AdamW.
        warmup_steps: batches of linear warm-up.
        lr_schedule: ``constant`` or ``cosine`` (to 5 % at the last batch).
        accumulate_grad_batches: batches per optimizer step.
        gradient_clip_val: limit of the gradient norm of each optimizer's parameters; 0 or None: none.
        max_bad_steps: consecutive steps with non-finite gradients before training is called diverged.
        seed: of all randomness inside steps.
    """

    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-4
    warmup_steps: int = 100
    lr_schedule: str = "constant"
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = 1.0
    max_bad_steps: int = 10
    seed: int = 0

    @classmethod
    def from_config(cls, training: DictConfig) -> Self:
        """How ``training.*`` says to minimise.

        Raises:
            ConfigurationError: a value is of no use.
        """
        values = {key: training[key] for key in cls.__dataclass_fields__}
        if isinstance(betas := values["betas"], Sequence) and not isinstance(betas, str):
            values["betas"] = tuple(betas)
        return cls(**values)

    def __post_init__(self) -> None:
        for key in ("learning_rate", "weight_decay"):
            require_number(f"training.{key}", getattr(self, key))
        for key, least in (("warmup_steps", 0), ("accumulate_grad_batches", 1), ("max_bad_steps", 1), ("seed", 0)):
            require_whole(f"training.{key}", getattr(self, key), least)
        if not isinstance(self.betas, tuple) or len(self.betas) != 2:
            raise ConfigurationError(f"training.betas={self.betas}: give two numbers, [0.9,0.99]")
        for beta in self.betas:
            require_number("an entry of training.betas", beta, 1)
        if self.lr_schedule not in ("constant", "cosine"):
            raise ConfigurationError(f"training.lr_schedule={self.lr_schedule!r}: use constant or cosine")
        if self.gradient_clip_val is not None:
            require_number("training.gradient_clip_val", self.gradient_clip_val)


def learning_rate_factor(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """Factor of the learning rate at batch ``step`` (the first is 1): linear warm-up, then constant or half cosine."""
    warmup = min(1.0, step / max(1, config.warmup_steps))
    if config.lr_schedule == "constant":
        return warmup
    progress = min(1.0, step / max(1, total_steps))
    return warmup * (COSINE_FLOOR + (1 - COSINE_FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))


def steps_of(module: pl.LightningModule) -> int:
    """Batches that a module of this project was trained on; it counts them itself, in a buffer."""
    steps = module.steps
    assert isinstance(steps, Tensor)
    return int(steps)


class GuardedOptimizer:
    """An optimizer with accumulation and clipping that never takes a step with a non-finite gradient.

    Args:
        name: for messages.
        module: the module whose ``manual_backward`` is used.
        optimizer: Lightning's wrapper of it.
        accumulate: batches per step.
        clip: limit of the gradient norm; 0 or None: none.
        max_bad_steps: consecutive skipped steps before training has diverged.
    """

    def __init__(
        self,
        name: str,
        module: pl.LightningModule,
        optimizer: Any,
        accumulate: int,
        clip: float | None,
        max_bad_steps: int,
    ) -> None:
        self.name = name
        self.module = module
        self.optimizer = optimizer
        self.accumulate = accumulate
        self.clip = clip
        self.max_bad_steps = max_bad_steps
        self.bad_steps = 0

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one batch of the window."""
        self.module.manual_backward(loss / self.accumulate)

    def step(self, learning_rate: float) -> Tensor:
        """Clip, step and clear; returns the gradient norm before clipping.

        Raises:
            DivergedError: too many consecutive steps had non-finite gradients.
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        if bool(norm.isfinite()):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
            self.bad_steps = 0
        else:
            self.bad_steps += 1
            steps = steps_of(self.module)
            log.warning("step %d: gradients of the %s are not finite, step skipped", steps, self.name)
            if self.bad_steps >= self.max_bad_steps:
                raise DivergedError(
                    f"training diverged: {self.bad_steps} consecutive steps up to {steps} had non-finite gradients: "
                    "lower training.learning_rate"
                )
        self.optimizer.zero_grad(set_to_none=True)
        return norm
