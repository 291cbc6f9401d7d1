"""The project's errors and exit codes: one line that says which file, what is wrong, and what to do.

Library code raises these; ``run_command`` is the only place that turns them into an exit code.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import IntEnum


class ExitCode(IntEnum):
    """Process exit codes; scripts and cluster schedulers may rely on them."""

    OK = 0
    BUG = 1
    USAGE = 2
    BAD_INPUT = 3
    SKIPS = 4
    DIVERGED = 5
    STORAGE = 6
    OUT_OF_MEMORY = 7
    SIGINT = 130
    SIGTERM = 143


class ProjectError(Exception):
    """An error that a user can act on; its message is a single line."""

    exit_code = ExitCode.BUG


class ConfigurationError(ProjectError):
    """The command line or configuration cannot be carried out as given."""

    exit_code = ExitCode.USAGE


class InputError(ProjectError):
    """A file or folder that was handed to us is missing, damaged or not what it claims to be."""

    exit_code = ExitCode.BAD_INPUT


class DivergedError(ProjectError):
    """Training produced non-finite numbers and could not recover."""

    exit_code = ExitCode.DIVERGED


class StorageError(ProjectError):
    """A disk is full, read-only or otherwise refuses to keep what we wrote."""

    exit_code = ExitCode.STORAGE


class MemoryExhaustedError(ProjectError):
    """The host or the accelerator has no memory left for this job."""

    exit_code = ExitCode.OUT_OF_MEMORY


class TerminatedError(ProjectError):
    """SIGTERM arrived; the run was saved at a step boundary."""

    exit_code = ExitCode.SIGTERM


def one_line(text: object) -> str:
    """Fold any message to a single line, so that the last line on stderr is the whole story."""
    return " ".join(str(text).split())


# How memory that ran out is worded where torch has no class of its own for it: the allocator of the CPU, a CUDA call
# outside torch's allocator, the libraries of matrix products and of convolutions.
_NO_MEMORY = (
    "DefaultCPUAllocator",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the host or a GPU has no memory left; by names, since nothing here needs torch."""
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def run_command(command: Callable[[], int | None], *, debug: bool = False) -> int:
    """Run ``command`` and return its exit code; known errors become one line on stderr.

    With ``debug`` errors propagate with their traceback. Memory that ran out where nobody expected it is told like the
    known ones. Anything else is a bug: it keeps its traceback (the report needs it) and Python's exit code 1.
    """
    try:
        return int(command() or ExitCode.OK)
    except ProjectError as error:
        if debug:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        return int(error.exit_code)
    except KeyboardInterrupt:
        if debug:
            raise
        print("error: interrupted (SIGINT)", file=sys.stderr)
        return int(ExitCode.SIGINT)
    except Exception as error:
        if debug or not is_out_of_memory(error):
            raise
        print(f"error: out of memory: smaller patches, tiles or batches need less ({one_line(error)})", file=sys.stderr)
        return int(ExitCode.OUT_OF_MEMORY)
