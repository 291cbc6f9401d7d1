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


def run_command(command: Callable[[], int | None], *, debug: bool = False) -> int:
    """Run ``command`` and return its exit code; known errors become one line on stderr.

    With ``debug`` errors propagate with their traceback. Anything unknown is a bug: it keeps its traceback (the
    report needs it) and Python's exit code 1.
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
