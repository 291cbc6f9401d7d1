"""The data of a training run: cohort, split, preparation and loaders, in one place for all trainers."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from dataset.manifest import manifest
from dataset.sampler import ResumableSampler
from dataset.sources import Size, VolumeSource, prepare_all
from dataset.splits import SPLIT_NAMES, TRAIN, VALIDATION, assign_splits
from dataset.volume_dataset import TileDataset, VolumeDataset, collate
from errors import ConfigurationError, InputError

# After a SIGTERM to the whole process group, so long may the trainer take to its next step boundary and to save.
WORKER_GRACE_S = 60


def _outlive_signals(worker: int) -> None:
    """Let a worker live while the trainer saves: Ctrl-C, `timeout` and SLURM send their signal to workers as well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(WORKER_GRACE_S))


def _given_splits(sources: Sequence[VolumeSource]) -> dict[str, str | None]:
    """The split that each patient's sources name, None where they name none.

    Raises:
        ConfigurationError: a split that is none, or one patient in two of them.
    """
    given: dict[str, str | None] = {}
    for source in sources:
        named = getattr(source, "split", None)
        if named is not None and str(named).lower() not in SPLIT_NAMES:
            raise ConfigurationError(f"{source.name}: split {named!r} is none of train, validation, test")
        split = None if named is None else SPLIT_NAMES[str(named).lower()]
        if given.setdefault(source.patient, split) != split:
            raise ConfigurationError(
                f"patient {source.patient} is in two splits ({given[source.patient]}, {split}): "
                "give all volumes of a patient the same"
            )
    return given


def training_order(count: int, batch_size: int, seed: int, rank: int, world_size: int) -> ResumableSampler:
    """The order in which ``count`` training samples are drawn.

    Raises:
        ConfigurationError: they do not fill one global batch.
    """
    sampler = ResumableSampler(count, batch_size, seed, rank, world_size)
    if sampler.batches == 0:
        raise ConfigurationError(
            f"{count} training samples do not fill one batch of {batch_size} × {world_size} process(es): "
            "lower training.batch_size or add volumes"
        )
    return sampler


class VolumeDataModule(pl.LightningDataModule):
    """Volumes split by patient, prepared once by one process, loaded by all.

    Args:
        sources: the cohort.
        size_dhw: every volume is resampled whole to this size; None keeps native grids.
        patch_dhw: training takes random patches of this size; None takes whole volumes.
        patches_per_volume: patches drawn from each volume in an epoch.
        validation_fraction: share of patients held out, by hash.
        validation: names of held-out patients, instead of the hash.
        cache: folder for prepared volumes.
        batch_size: per process.
        num_workers: loader processes.
        worker_timeout_s: a worker that is silent for longer ends the run.
        seed: of order and positions.
        max_bad_fraction: share of volumes that may be unreadable.
        tissue_bias: share of training patches that are centred in the body.
        validation_tiles: with ``patch_dhw``, what is validated of a held-out volume: 0 its central patch, N so many
            tiles, evenly spaced, None all that cover it.
        overfit_patches: so many training samples, the same ones in every epoch, to see whether they can be learnt;
            None: all.

    Raises:
        ConfigurationError: an empty split, splits that contradict each other, or a number that cannot be.
    """

    def __init__(
        self,
        sources: Sequence[VolumeSource],
        *,
        size_dhw: Size | None,
        patch_dhw: Size | None,
        patches_per_volume: int,
        validation_fraction: float,
        validation: Sequence[str],
        cache: Path,
        batch_size: int,
        num_workers: int,
        worker_timeout_s: float,
        seed: int,
        max_bad_fraction: float,
        tissue_bias: float = 0.0,
        validation_tiles: int | None = 0,
        overfit_patches: int | None = None,
    ) -> None:
        super().__init__()
        self.collate = collate  # of samples into a batch; latents have one of their own
        self.size_dhw, self.patch_dhw = size_dhw, patch_dhw
        self.patches_per_volume = patches_per_volume
        self.cache = cache
        self.batch_size, self.num_workers, self.worker_timeout_s = batch_size, num_workers, worker_timeout_s
        self.seed = seed
        self.max_bad_fraction = max_bad_fraction
        self.tissue_bias = tissue_bias
        self.validation_tiles = validation_tiles
        if validation_tiles is not None and validation_tiles < 0:
            raise ConfigurationError(
                f"dataset.validation_tiles={validation_tiles}: give a number of tiles, null for all"
            )
        self.overfit_patches = overfit_patches
        if overfit_patches is not None and not (type(overfit_patches) is int and overfit_patches >= 1):
            raise ConfigurationError(
                f"dataset.overfit_patches={overfit_patches}: give a number of samples, at least 1, or null for all"
            )
        splits = assign_splits(
            _given_splits(sources), validation_fraction=validation_fraction, validation=list(validation)
        )
        # sources of the test split are in neither: nothing here ever opens them
        self.sources = {
            "training": [source for source in sources if splits[source.patient] == TRAIN],
            "validation": [source for source in sources if splits[source.patient] == VALIDATION],
        }
        self.bad: dict[str, str] = {}
        self.datasets: dict[str, VolumeDataset | TileDataset] = {}
        self.sampler: ResumableSampler | None = None

    @property
    def manifest(self) -> str:
        """Hash of the cohort: who is trained on, who is held out, and what their volumes hold."""
        return manifest(self.sources)

    def build(self, rank: int, world_size: int) -> ResumableSampler:
        """Prepare all volumes and the training order; the cache makes it cheap for the second process.

        Raises:
            InputError: too many volumes cannot be read.
            ConfigurationError: fewer training samples than one global batch.
        """
        for split, sources in self.sources.items():
            volumes, failed = prepare_all(sources, self.size_dhw, self.cache, f"{split} volumes")
            self.bad |= failed
            if not volumes or len(failed) > self.max_bad_fraction * len(sources):
                raise InputError(
                    f"{len(failed)} of {len(sources)} {split} volumes cannot be read, more than "
                    f"dataset.max_bad_fraction={self.max_bad_fraction}; the first: {next(iter(failed.values()))}"
                )
            train = split == "training"
            if not train and self.patch_dhw is not None and self.validation_tiles != 0:
                self.datasets[split] = TileDataset(volumes, self.patch_dhw, limit=self.validation_tiles)
                continue
            self.datasets[split] = VolumeDataset(
                volumes,
                self.patch_dhw,
                random=train,
                patches_per_volume=self.patches_per_volume if train else 1,
                seed=self.seed,
                tissue_bias=self.tissue_bias,
                overfit_patches=self.overfit_patches if train else None,
            )
        self.sampler = training_order(len(self.datasets["training"]), self.batch_size, self.seed, rank, world_size)
        return self.sampler

    @property
    def batches_in_flight(self) -> int:
        """Batches that workers hold at a time."""
        return max(1, 2 * self.num_workers)

    def names_of_training(self, steps: int) -> list[str]:
        """Names of the volumes that workers are busy with after ``steps`` batches."""
        assert self.sampler is not None
        self.sampler.resume_at(steps)
        volumes = self.datasets["training"].volumes
        indices = [index for _, index in islice(self.sampler, self.batches_in_flight * self.batch_size)]
        if self.overfit_patches is not None:
            indices = [index % self.overfit_patches for index in indices]
        return list(dict.fromkeys(volumes[index % len(volumes)].name for index in indices))

    def _share_of_validation(self) -> list[int]:
        """Held-out samples of this rank, in order; ranks share by volume, so that one rank sees all of a volume."""
        assert self.sampler is not None
        dataset, world_size = self.datasets["validation"], self.sampler.world_size
        count = len(dataset.volumes)
        # fewer volumes than ranks: all see all of them, since an empty loader would leave a rank out of collectives
        volumes = list(range(count) if count < world_size else range(self.sampler.rank, count, world_size))
        return dataset.of_volumes(volumes) if isinstance(dataset, TileDataset) else volumes

    def names_of_validation(self) -> list[str]:
        """Name of the volume of each of this rank's validation batches, in order."""
        dataset = self.datasets["validation"]
        share = self._share_of_validation()
        if isinstance(dataset, TileDataset):
            return [dataset.volumes[dataset.tiles[index][0]].name for index in share]
        return [dataset.volumes[index].name for index in share]

    def _loader(self, split: str, **options: Any) -> DataLoader[dict[str, Any]]:
        return DataLoader(
            self.datasets[split],
            num_workers=self.num_workers,
            collate_fn=self.collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            timeout=self.worker_timeout_s if self.num_workers > 0 else 0,
            worker_init_fn=_outlive_signals,
            # loaders draw a seed for their workers; from a generator of their own it does not disturb ours
            generator=torch.Generator(),
            **options,
        )

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Loader of training batches."""
        return self._loader("training", batch_size=self.batch_size, sampler=self.sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Loader of held-out volumes or of their tiles, one at a time; every rank takes its share."""
        return self._loader("validation", batch_size=1, sampler=self._share_of_validation())
