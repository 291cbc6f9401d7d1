"""What to compute on: the ``hardware`` group, resolved against the machine."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config
from omegaconf import DictConfig, ListConfig
from torch import nn

from errors import ConfigurationError


@dataclass(frozen=True)
class Hardware:
    """Resolved hardware.

    Attributes:
        accelerator: ``cpu`` or ``cuda``.
        devices: CUDA device numbers, or a number of CPU processes.
        num_nodes: machines.
        bf16: train in bf16 mixed precision.
        compile: use torch.compile.
        deterministic: only deterministic kernels.
    """

    accelerator: str
    devices: list[int] | int
    num_nodes: int
    bf16: bool
    compile: bool
    deterministic: bool

    @property
    def per_node(self) -> int:
        """Number of processes on each machine."""
        return self.devices if isinstance(self.devices, int) else len(self.devices)

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.per_node * self.num_nodes

    def trainer_arguments(self, *, unused_parameters: bool = False) -> dict[str, Any]:
        """Arguments for Lightning's Trainer.

        Args:
            unused_parameters: some parameters have no part in some backward passes.
        """
        strategy = "auto"
        if self.world_size > 1:
            strategy = "ddp_find_unused_parameters_true" if unused_parameters else "ddp"
        return {
            "accelerator": self.accelerator,
            "devices": self.devices,
            "num_nodes": self.num_nodes,
            "strategy": strategy,
            "precision": "bf16-mixed" if self.bf16 else "32-true",
            "deterministic": self.deterministic,
        }


def resolve_hardware(config: DictConfig) -> Hardware:
    """Resolve ``device`` (auto | cpu | cuda | cuda:N | [0,1]) and ``mixed_precision`` (auto | bf16 | off).

    Raises:
        ConfigurationError: a value is unknown or the machine has no such device.
    """
    device: Any = config.device
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices: list[int] | int
    if device == "auto":
        device = "cuda" if available else "cpu"
    if device == "cpu":
        accelerator, devices = "cpu", int(config.processes)
    else:
        accelerator = "cuda"
        if device == "cuda":
            devices = list(range(available)) or [0]
        elif isinstance(device, ListConfig | list):
            devices = [int(number) for number in device]
        elif isinstance(device, str) and device.startswith("cuda:") and device[5:].isdigit():
            devices = [int(device[5:])]
        else:
            raise ConfigurationError(f"hardware.device={device!r} is unknown: use auto, cpu, cuda, cuda:N or [0,1]")
        if missing := [number for number in devices if number >= available]:
            raise ConfigurationError(
                f"hardware.device={device}: this machine has {available} CUDA device(s), not number {missing[0]}: "
                "use hardware.device=auto or cpu"
            )
    precision = config.mixed_precision
    if precision is True or precision is False:  # YAML reads on and off as booleans
        precision = "bf16" if precision else "off"
    if precision not in ("auto", "bf16", "off"):
        raise ConfigurationError(f"hardware.mixed_precision={precision!r} is unknown: use auto, bf16 or off")
    bf16 = precision == "bf16" or (precision == "auto" and _has_bf16(accelerator))
    return Hardware(accelerator, devices, config.num_nodes, bf16, bool(config.compile), bool(config.deterministic))


def _has_bf16(accelerator: str) -> bool:
    if accelerator == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported())


def compile_parts(parts: Iterable[nn.Module]) -> None:
    """Compile modules in place; names of their weights stay.

    The adaptive weight of the adversarial loss takes several gradients of one graph. A backward pass that was compiled
    before it was needed would give its buffers away with the first.
    """
    torch._functorch.config.donated_buffer = False
    for part in parts:
        part.compile()


def return_memory_early() -> None:
    """Make the C library hand blocks over 2 MB back to the system as soon as they are freed (glibc; elsewhere nothing).

    By default it learns to keep blocks of up to 32 MB, activations among them, and their fragments cost a third of the
    resident memory of a checkpointed step on the CPU.
    """
    m_mmap_threshold, two_megabytes = -3, 2 << 20
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(m_mmap_threshold, two_megabytes)
