"""Peak memory of a step, in this process or in one of its own."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from errors import ConfigurationError, MemoryExhaustedError
from vq_gan_3d.memory import status_bytes


class PeakMemory:
    """Peak memory inside a ``with`` block above what was held on entry, in ``bytes`` after the block.

    On the CPU it is the high-water mark of the resident set, which is reset on entry (Linux only); memory that the
    process keeps from earlier work hides allocations, so measure in a fresh process (``peak_rss_of``). On CUDA it is
    the allocator's own peak.

    Args:
        device: where the block allocates.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self.bytes = 0
        self._baseline = 0

    def __enter__(self) -> Self:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._baseline = torch.cuda.memory_allocated(self.device)
            return self
        _return_free_memory()
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._baseline = status_bytes("VmRSS")
        except OSError as error:
            raise ConfigurationError(
                f"peak memory needs Linux and a writable /proc/self/clear_refs ({error})"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = status_bytes("VmHWM")
        self.bytes = max(0, peak - self._baseline)


def peak_rss_of(prepare: Callable[..., Callable[[], object]], *args: Any, device: str | torch.device = "cpu") -> int:
    """Peak memory of a step above what its preparation holds, in a process of its own.

    Args:
        prepare: a function of a module (a fresh process must be able to import it); builds the model and returns the
            step to measure, e.g. one training step. What it holds when it returns is the baseline.
        args: for ``prepare``; plain values.
        device: where the step allocates.

    Returns:
        Bytes.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(_peak_here, prepare, args, str(device), torch.get_num_threads()).result()
        except BrokenProcessPool as error:
            raise MemoryExhaustedError(
                f"the process that measured {prepare.__name__}{args} was killed, most likely for want of memory"
            ) from error


def _peak_here(prepare: Callable[..., Callable[[], object]], args: tuple[Any, ...], device: str, threads: int) -> int:
    torch.set_num_threads(threads)
    step = prepare(*args)
    with PeakMemory(device) as peak:
        step()
    return peak.bytes


def _return_free_memory() -> None:
    """Hand freed heap back to the system, so that it does not hide what is allocated next (glibc only)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
