"""Many patients, many machines: one function over many jobs, with a report, resuming and a verdict.

A job is a module-level function and JSON-able arguments. It runs here, in worker processes, or on a Dask cluster, with
the same results to the byte. A bad patient, or a worker process that dies, becomes a line in the report and stops
nothing else; a disk that refuses stops the batch (exit 6), because it would refuse every patient.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from errors import ConfigurationError, ExitCode, TerminatedError
from preprocess.batch_report import Report, still_holds
from preprocess.batch_workers import Task, in_process, on_dask, on_processes, reference_of, stop_if_told

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One patient's work.

    Args:
        name: unique in its batch; the key of its record.
        arguments: JSON-able keyword arguments of the function. Paths are absolute strings, because a cluster's
            workers have another working directory. A changed argument, or a file or folder named by one that changed
            its size or time, makes ``resume`` repeat the job; arguments called ``output…`` are not looked into.
    """

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class BatchResult:
    """What became of every job.

    Attributes:
        records: what the function returned, by job name, sorted.
        failures: one line for each job that failed, by job name, sorted.
        report: the JSON file that holds both.
        resumed: how many records were taken over from an earlier run.
    """

    records: dict[str, dict[str, Any]]
    failures: dict[str, str]
    report: Path
    resumed: int = field(default=0, compare=False)

    @property
    def exit_code(self) -> ExitCode:
        """0, 4 if some jobs failed, 3 if all did."""
        if not self.failures:
            return ExitCode.OK
        return ExitCode.SKIPS if self.records else ExitCode.BAD_INPUT


def run_batch(
    function: Callable[..., dict[str, Any]],
    jobs: Sequence[Job],
    *,
    workers: int = 0,
    scheduler: str | None = None,
    report: Path,
    resume: bool = False,
    description: str,
) -> BatchResult:
    """Run ``function(**job.arguments)`` for every job; the report is rewritten as work goes on.

    Args:
        function: at the top level of an importable module (a script of this project counts). Returns a JSON-able
            record with ``outputs``, the list of files it wrote, and raises ProjectError on bad input.
        jobs: in the order in which to start them.
        workers: worker processes on this machine; 0 runs in this process.
        scheduler: ``tcp://host:port`` of a Dask scheduler; its workers need this project and these paths.
        report: JSON file; its folder is created.
        resume: take over what an earlier run with this report has done. A job is repeated unless its arguments and
            inputs are unchanged and all its outputs have the recorded size and SHA-256.
        description: what is going on, for the progress bar and the report.

    Raises:
        ConfigurationError: two jobs of one name, or no such scheduler.
        InputError: ``resume`` with a damaged report.
        StorageError: the report or a job's result cannot be written.
        TerminatedError: SIGTERM; the report is kept, as it is on SIGINT (KeyboardInterrupt).
    """
    names = [job.name for job in jobs]
    if twice := sorted({name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()):
        raise ConfigurationError(f"{report}: two jobs are called {twice[0]!r}: give each a name of its own")
    if workers < 0:
        raise ConfigurationError(f"--workers {workers}: give 0 (in this process) or a number of processes")
    reference = reference_of(function)
    book = Report(report, description, reference, len(jobs))
    if resume and report.exists():
        book.take_over(_unchanged(book.earlier(), reference, jobs, str(report.parent), max(1, workers)))
    resumed = len(book.entries)
    tasks = [Task(job.name, reference, job.arguments, str(report.parent)) for job in jobs if job.name not in book]

    if tasks and scheduler is not None:
        outcomes = on_dask(tasks, scheduler)
    elif tasks and workers > 0:
        outcomes = on_processes(tasks, min(workers, len(tasks)))
    else:
        outcomes = in_process(tasks, function)
    bar = tqdm(total=len(jobs), initial=resumed, desc=description, unit="job", disable=not sys.stderr.isatty())
    try:
        with _interruptible(), bar, closing(outcomes):
            for name, outcome in outcomes:
                stop_if_told(outcome)
                if outcome.traceback:
                    log.debug("%s: %s", name, outcome.traceback)
                book.add(name, outcome)
                bar.update()
                if book.failures:
                    bar.set_postfix(failed=len(book.failures))
    except BaseException:
        if book.grown:  # a batch that never began leaves an earlier report alone
            book.write()
        raise
    book.write()
    return BatchResult(book.records, book.failures, report, resumed)


def add_batch_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --input, --output, --workers, --scheduler, --resume and --debug; paths come out absolute."""
    parser.add_argument("--input", type=absolute_path, required=True, help="folder to read, searched recursively")
    parser.add_argument("--output", type=absolute_path, required=True, help="folder for results, created if missing")
    parser.add_argument("--workers", type=int, default=0, help="worker processes (default: 0, in this process)")
    parser.add_argument("--scheduler", metavar="tcp://HOST:PORT", help="run on the Dask cluster of this scheduler")
    parser.add_argument("--resume", action="store_true", help="skip what the report in --output says is done")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def run_as_asked(
    function: Callable[..., dict[str, Any]],
    jobs: Sequence[Job],
    arguments: argparse.Namespace,
    report_name: str,
    description: str,
) -> BatchResult:
    """`run_batch` with the arguments of `add_batch_arguments`; the report goes into --output."""
    return run_batch(
        function,
        jobs,
        workers=arguments.workers,
        scheduler=arguments.scheduler,
        report=arguments.output / report_name,
        resume=arguments.resume,
        description=description,
    )


def absolute_path(text: str) -> Path:
    """A path from the command line, absolute, ``~`` expanded, links kept."""
    return Path(text).expanduser().absolute()


def summarise(result: BatchResult, what: str) -> int:
    """Print one line on what was done, each failure on stderr, the verdict last; returns the exit code."""
    total = len(result.records) + len(result.failures)
    already = f" ({result.resumed} were done already)" if result.resumed else ""
    print(f"{len(result.records)} of {total} {what}{already}; report: {result.report}", flush=True)
    reasons = list(result.failures.values())
    if len(reasons) == 1:
        print(f"error: {reasons[0]}", file=sys.stderr)
    elif reasons:
        for reason in reasons:
            print(f"failed: {reason}", file=sys.stderr)
        print(f"error: {len(reasons)} of {total} failed, the first: {reasons[0]}", file=sys.stderr)
    return int(result.exit_code)


def _unchanged(
    earlier: dict[str, dict[str, Any]], reference: str, jobs: Sequence[Job], skip: str, threads: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Entries of an earlier report that still hold for these jobs."""
    known = [job for job in jobs if job.name in earlier]
    # hashing releases the interpreter's lock
    with ThreadPoolExecutor(threads) as pool:
        checks = pool.map(lambda job: still_holds(earlier[job.name], reference, job.arguments, skip), known)
        for job, holds in zip(known, checks, strict=True):
            if holds:
                yield job.name, earlier[job.name]


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGINT and SIGTERM end the batch with its report, also where a shell started it in the background."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        raise TerminatedError("stopped by SIGTERM: the report is kept, go on with --resume")

    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
