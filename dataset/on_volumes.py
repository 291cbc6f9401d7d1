"""Data modules that feed a trainer with something else of the same patients than their volumes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from dataset.data_module import VolumeDataModule, training_order
from dataset.sampler import ResumableSampler
from dataset.sources import VolumeSource
from errors import ConfigurationError


class OnVolumesDataModule(pl.LightningDataModule):
    """Patients split and prepared by a `VolumeDataModule`, whose loaders and names serve here.

    Args:
        volumes: the cohort.

    Raises:
        ConfigurationError: a setting of the cohort that trainers on volumes alone heed.
    """

    def __init__(self, volumes: VolumeDataModule) -> None:
        super().__init__()
        if volumes.overfit_patches is not None:
            raise ConfigurationError(
                f"dataset.overfit_patches={volumes.overfit_patches}: only the codec trains on patches: leave it null"
            )
        self.volumes = volumes

    @property
    def manifest(self) -> str:
        """Hash of the cohort."""
        return self.volumes.manifest

    @property
    def sources(self) -> dict[str, list[VolumeSource]]:
        """The cohort by split."""
        return self.volumes.sources

    @property
    def bad(self) -> dict[str, str]:
        """Cases that could not be prepared, with the reason."""
        return self.volumes.bad

    @property
    def batches_in_flight(self) -> int:
        """Batches that workers hold at a time."""
        return self.volumes.batches_in_flight

    def take_over(
        self,
        datasets: Mapping[str, Any],
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
        rank: int,
        world_size: int,
    ) -> ResumableSampler:
        """Let the loaders of the volumes serve these datasets instead, and give their training order.

        Raises:
            ConfigurationError: fewer training samples than one global batch.
        """
        v = self.volumes
        v.datasets = dict(datasets)
        v.collate = collate  # type: ignore[assignment]  # declared by its default
        v.sampler = training_order(len(datasets["training"]), v.batch_size, v.seed, rank, world_size)
        return v.sampler

    def names_of_training(self, steps: int) -> list[str]:
        """What workers are busy with after ``steps`` batches."""
        return self.volumes.names_of_training(steps)

    def names_of_validation(self) -> list[str]:
        """Held-out cases of this rank, in order."""
        return self.volumes.names_of_validation()

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Loader of training batches."""
        return self.volumes.train_dataloader()

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Loader of held-out cases, one at a time."""
        return self.volumes.val_dataloader()
