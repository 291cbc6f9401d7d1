"""Resident memory of this process."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def status_bytes(field: str) -> int:
    """A size that Linux reports of this process, such as ``VmRSS`` (now) or ``VmHWM`` (the largest so far).

    Raises:
        OSError: another system, or no such field.
    """
    for line in _STATUS.read_text().splitlines():
        key, _, value = line.partition(":")
        if key == field:
            return int(value.split()[0]) * 1024  # "123 kB"
    raise OSError(f"{_STATUS} has no {field}")


def peak_rss_bytes() -> int:
    """The largest resident set of this process so far.

    ``ru_maxrss`` serves only where there is no ``VmHWM``: a process starts with the ``ru_maxrss`` of its parent.
    """
    if sys.platform == "linux":
        return status_bytes("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
