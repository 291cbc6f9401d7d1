"""Collectives that do nothing in a single process, so that callers need no branches."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process among them."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather_objects(x: Any) -> list[Any]:
    """What each rank gave, by rank; pickled, for small things now and then."""
    if world_size() == 1:
        return [x]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, x)
    return gathered


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum over ranks, in place; no gradient."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def all_reduce_mean(x: Tensor) -> Tensor:
    """Mean over ranks, in place; no gradient."""
    return all_reduce_sum(x).div_(world_size())
