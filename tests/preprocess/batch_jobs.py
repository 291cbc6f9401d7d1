"""A job for the tests of batches, in a module of its own: worker processes import it, and must not wait for torch."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from errors import InputError, MemoryExhaustedError, StorageError


def work(value: int, output: str, source: str | None = None, how: str = "good") -> dict[str, Any]:
    """A patient: writes its value, or ends in the way it is told."""
    if how == "bad":
        raise InputError(f"{source}: truncated: copy it again")
    if how == "bug":
        raise KeyError("a\nbug")
    if how == "memory":
        raise MemoryExhaustedError("it: too large")
    if how == "disk":
        raise StorageError(f"{output}: not written, the disk is full")
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        os._exit(7)
    if how == "sleep":
        Path(output).with_suffix(".started").touch()
        time.sleep(60)
    if how == "not json":
        return {"value": {value}}
    Path(output).write_text(str(value))
    with open(f"{output}.calls", "a") as calls:
        calls.write("x")
    return {"value": (value, 0.1), "outputs": [output]}
