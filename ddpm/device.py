"""Where inference and evaluation compute: what a user names, and what is said when a model does not fit there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from errors import ConfigurationError, MemoryExhaustedError, is_out_of_memory

DEVICE_HELP = "auto (a GPU where there is one), cpu, cuda or cuda:N (default: auto)"


def chosen_device(name: str) -> str:
    """The device that a user names.

    Args:
        name: ``auto`` (a GPU where there is one), ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ConfigurationError: there is none of that name.
    """
    import torch  # --help of the scripts need not wait for it

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if count else "cpu"
    if name == "cpu" or (name == "cuda" and count):
        return name
    number = name.removeprefix("cuda:")
    if number.isdecimal() and int(number) < count:
        return name
    raise ConfigurationError(f"device {name!r}: this machine has {count} CUDA device(s): use auto, cpu, cuda or cuda:N")


@contextmanager
def room_on(device: object) -> Iterator[None]:
    """While a model is brought to a device: no memory there is told in one line.

    Raises:
        MemoryExhaustedError: the device has no room for it.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryExhaustedError(
            f"{device}: no memory for the model: free it, or use another device (cpu, cuda:N)"
        ) from error
