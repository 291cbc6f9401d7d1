"""What differs between the trainers of this project; everything else stands once, in ``training.py``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pytorch_lightning as pl
from omegaconf import DictConfig
from torch import Tensor, nn

from dataset.sampler import ResumableSampler
from dataset.sources import VolumeSource


@dataclass(frozen=True)
class Monitor:
    """The validation metric that decides ``best.ckpt``.

    Attributes:
        name: as logged, for instance ``val/psnr_db``.
        larger_is_better: its direction.
    """

    name: str
    larger_is_better: bool

    def worst(self) -> float:
        """A score that every other one beats."""
        return float("-inf") if self.larger_is_better else float("inf")

    def beats(self, score: float, best: float) -> bool:
        """Whether ``score`` is better than ``best``; NaN never is."""
        return score > best if self.larger_is_better else score < best


class TrainingData(Protocol):
    """A LightningDataModule of this project.

    Attributes:
        manifest: hash of the cohort.
        sources: the cohort by split, ``training`` and ``validation``.
        bad: volumes that could not be read, with the reason, by name.
        batches_in_flight: batches that workers hold at a time.
    """

    @property
    def manifest(self) -> str: ...  # noqa: D102
    @property
    def sources(self) -> dict[str, list[VolumeSource]]: ...  # noqa: D102
    @property
    def bad(self) -> dict[str, str]: ...  # noqa: D102
    @property
    def batches_in_flight(self) -> int: ...  # noqa: D102

    def build(self, rank: int, world_size: int) -> ResumableSampler:
        """Prepare everything and the order of training samples."""

    def names_of_training(self, steps: int) -> list[str]:
        """What workers are busy with after ``steps`` batches."""

    def names_of_validation(self) -> list[str]:
        """Held-out samples of this rank, in order."""


class TrainedModule(Protocol):
    """A LightningModule of this project, beside what Lightning asks for.

    Attributes:
        steps: buffer that counts the batches it was trained on.
        total_steps: set by the runner; a cosine schedule ends there.
    """

    steps: Tensor
    total_steps: int

    def parameters_by_part(self) -> dict[str, int]:
        """Number of parameters of each part."""

    def panel(self, batch: Mapping[str, Any], output: Any) -> np.ndarray | None:
        """A picture, uint8 (height, width, 3), of one validation batch; None draws nothing."""

    def histograms(self) -> dict[str, Tensor]:
        """Distributions over the whole validation set, for TensorBoard."""


class Stage(Protocol):
    """A kind of training run, by what is its own.

    Attributes:
        monitor: decides the best checkpoint.
        memory_hint: what to change when memory runs out.
        unused_parameters: whether some parameters have no part in some backward passes.
    """

    monitor: Monitor
    memory_hint: str
    unused_parameters: bool

    def build_data(self, config: DictConfig) -> TrainingData:
        """The data that the configuration describes; nothing is read yet but names."""

    def build_module(self, config: DictConfig, data: Any) -> pl.LightningModule:
        """The module, once the data is built."""

    def contract(self, config: DictConfig) -> dict[str, Any]:
        """Settings that must not change between a run and its continuation, beside those of all stages."""

    def to_compile(self, module: Any) -> Iterable[nn.Module]:
        """Parts for ``hardware.compile``."""

    def facts(self, module: Any, data: Any) -> Sequence[str]:
        """Lines for the log, beside those of all stages."""
