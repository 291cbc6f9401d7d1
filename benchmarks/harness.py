"""What every benchmark shares: the machine, fair timing, counted work, the report.

Conventions of a report: ``value`` is ours, ``reference`` is the other side measured in the same run, and a ``ratio``
above 1 always means that ours is better, whichever direction is better for the quantity.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

PACKAGES = ("torch", "numpy", "monai")  # named in every report where installed
_FAST_BF16 = ("amx_bf16", "avx512_bf16")  # CPU flags that decide how fast bf16 is


# --- the report -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One measured quantity; ``value`` and ``reference`` in ``unit``, ``ratio`` above 1 where ours is better."""

    what: str
    value: float
    unit: str
    reference: float | None = None
    ratio: float | None = None

    @classmethod
    def compared(
        cls, what: str, value: float, unit: str, reference: float, better: Literal["lower", "higher"] = "lower"
    ) -> Self:
        """A row with its ratio: reference / ours where lower is better, ours / reference where higher is.

        The ratio is ``None`` where the denominator is 0 (an error of exactly 0 has no finite ratio).
        """
        above, below = (reference, value) if better == "lower" else (value, reference)
        return cls(what, value, unit, reference, above / below if below else None)


def machine_info() -> dict[str, Any]:
    """CPU model, usable cores, torch threads, bf16 instructions, RAM in GiB, load, and the GPU's name where CUDA works.

    A load (runnable processes, mean of the last minute) above the cores says that others were at work beside us.
    """
    cpu, flags = platform.processor() or platform.machine(), set[str]()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = dict(_field(line) for line in cpuinfo.read_text().splitlines() if ":" in line)
        cpu, flags = fields.get("model name", cpu), set(fields.get("flags", "").split())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else None
    return {
        "cpu": cpu,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "bf16": [flag for flag in _FAST_BF16 if flag in flags],
        "ram_gib": None if ram is None else round(ram, 1),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.release()}",
    }


def versions(packages: Iterable[str] = ()) -> dict[str, str]:
    """Version of Python and of the installed ones among ``PACKAGES`` and ``packages``; nothing is imported."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *packages):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def command_line(arguments: Sequence[str]) -> str:
    """What was called, with the names of files and folders but not where they lie: a report may be published."""
    return " ".join(re.sub(r"[^=]*/", "", part.rstrip("/")) for part in arguments)


def write_report(path: str | Path, rows: Sequence[Row], packages: Iterable[str] = ()) -> None:
    """Write ``command``, ``machine``, ``date`` (UTC), ``versions``, ``rows`` as JSON; non-finite values are refused."""
    report = {
        "command": command_line(sys.argv),
        "machine": machine_info(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(packages),
        "rows": [asdict(row) for row in rows],
    }
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)  # before the file is touched
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")


def print_table(rows: Sequence[Row]) -> None:
    """Print the rows as an aligned table."""
    head = ("what", "ours", "unit", "reference", "ratio")
    cells = [(r.what, _number(r.value), r.unit, _number(r.reference), _number(r.ratio, "×")) for r in rows]
    widths = [max(len(line[column]) for line in [head, *cells]) for column in range(len(head))]
    for line in [head, tuple("-" * width for width in widths), *cells]:
        columns = [
            text.ljust(width) if column in (0, 2) else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(columns).rstrip())


def standard_parser(description: str) -> argparse.ArgumentParser:
    """The command line that all benchmarks share: ``--quick`` and ``--json FILE``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: a check, not a measurement")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, date, versions and rows to FILE")
    return parser


def _field(line: str) -> tuple[str, str]:
    key, _, value = line.partition(":")
    return key.strip(), value.strip()


def _number(value: float | None, suffix: str = "") -> str:
    if value is None:
        return ""
    return (f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}") + suffix


# --- time -----------------------------------------------------------------------------------------------------------


def synchronize() -> None:
    """Wait for the GPU where one is in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def time_interleaved(steps: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Time the steps in turn, A B C A B C …, so that a drift of the machine meets all of them alike.

    Args:
        steps: name → what to time; all keep their state between rounds.
        rounds: timed calls of each.
        warmup: calls of each beforehand, not timed.

    Returns:
        Seconds of every round, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(warmup + rounds):
        for name, step in steps.items():
            gc.collect()
            synchronize()
            start = time.perf_counter()
            step()
            synchronize()
            if index >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Median seconds by name."""
    return {name: statistics.median(seconds) for name, seconds in times.items()}


# --- work -----------------------------------------------------------------------------------------------------------


def conv_mflop_per_voxel_step(model: nn.Module, size: int = 32) -> float:
    """Counted MFLOP of all convolutions, forward and backward, per voxel of a ``(1, 1, size, size, size)`` input.

    A multiplication and an addition count as 2. The input needs no gradient, so that of the first convolution is not
    counted. A copy of the model is run on its own device; the model itself stays untouched.
    """
    model = copy.deepcopy(model).train()
    device = next(model.parameters()).device
    with FlopCounterMode(display=False) as counter:
        output = model(torch.rand(1, 1, size, size, size, device=device))
        parts = output if isinstance(output, (tuple, list)) else (output,)
        torch.stack([part.float().mean() for part in parts if part.requires_grad]).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for op, count in counts.items() if "convolution" in str(op)) / size**3 / 1e6


def conv_roof_steps(
    channels: int, size: int, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[float, dict[str, Callable[[], object]]]:
    """A plain 3³ convolution, forward and backward: the roof for models made of them, timed beside them.

    Args:
        channels: in and out.
        size: edge of the ``(1, channels, size, size, size)`` input, in voxels.
        dtype: of weights and activations.
        device: where to run.

    Returns:
        GFLOP of a step, a multiplication and an addition counted as 2, backward as twice the forward pass; and the
        step in each memory layout, by its name. The faster one is the roof.
    """

    def step_in(layout: torch.memory_format) -> Callable[[], object]:
        conv = nn.Conv3d(channels, channels, 3, padding=1).to(device=device, dtype=dtype)
        conv.to(memory_format=layout)  # type: ignore[call-overload]  # missing in the stubs
        x = torch.randn(1, channels, size, size, size, device=device, dtype=dtype)
        x = x.to(memory_format=layout).requires_grad_()
        gradient = torch.randn_like(x)

        def step() -> None:
            conv.zero_grad(set_to_none=True)
            x.grad = None
            conv(x).backward(gradient)

        return step

    layouts = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last_3d}
    return 3 * 2 * 27 * channels**2 * size**3 / 1e9, {name: step_in(layout) for name, layout in layouts.items()}
