"""Order of training samples: a pure function of seed and epoch, and a position to go on from."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from errors import ConfigurationError


class ResumableSampler(Sampler[tuple[int, int]]):
    """Yields (epoch, index) in a random order that ranks share and a killed run finds again.

    The order of an epoch is ``randperm(seed, epoch)``. Of each global batch rank r takes the r-th contiguous part, so R
    processes of batch B see what one process of batch R*B sees. Iterating consumes no state: loaders prefetch and make
    iterators nobody uses.

    Args:
        length: number of samples.
        batch_size: samples per rank and batch; a last, incomplete global batch is left out.
        seed: of the order.
        rank: this process.
        world_size: number of processes.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.length = length
        self.batches = length // (batch_size * world_size)
        self.epoch = 0
        self._resume_epoch = 0
        self._resume_batch = 0

    def keep_whole_windows(self, accumulate: int) -> None:
        """Round the batches of an epoch down to a multiple of ``accumulate``, the batches of an optimizer step.

        The end of an epoch, where most checkpoints are written, is then the boundary of an optimizer step, and no
        gradient of a part of one is lost there. Call it before `resume_at`.

        Raises:
            ConfigurationError: an epoch has not even that many.
        """
        if self.batches < accumulate:
            raise ConfigurationError(
                f"training.accumulate_grad_batches={accumulate}: an epoch has only {self.batches} batches: "
                "lower it or training.batch_size, or add volumes"
            )
        self.batches -= self.batches % accumulate

    def resume_at(self, steps: int) -> None:
        """Continue after ``steps`` batches: mid-epoch, the first iteration leaves out what was seen."""
        self._resume_epoch, self._resume_batch = divmod(steps, self.batches)
        self.epoch = self._resume_epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration (called by the trainer)."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Samples of a whole epoch on this rank, also while the first epoch of a resumed run yields fewer."""
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.length, generator=generator)[: self.batches * self.batch_size * self.world_size]
        mine = order.view(self.batches, self.world_size, self.batch_size)[:, self.rank]
        first = self._resume_batch if self.epoch == self._resume_epoch else 0
        for index in mine[first:].flatten().tolist():
            yield self.epoch, index
