"""Where the jobs of a batch run: in this process, in worker processes, on a Dask cluster. One function runs them all.

Each way yields ``(job name, Outcome)`` as jobs end, in any order, and cleans up when it is closed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import multiprocessing
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NoReturn

from errors import ConfigurationError, ExitCode, ProjectError, StorageError, TerminatedError, one_line
from preprocess.batch_report import describe_output, fingerprint

_ROOT = Path(__file__).resolve().parents[1]
_DASK_TIMEOUT_S = 15
_GRACE_S = 5.0


@dataclass(frozen=True)
class Task:
    """A job on its way to a worker: name, ``module:function``, keyword arguments, the batch's output folder."""

    name: str
    reference: str
    arguments: dict[str, Any]
    output_folder: str


@dataclass(frozen=True)
class Outcome:
    """What became of a task.

    Attributes:
        record: what the function returned, without its outputs.
        outputs: path, bytes and sha256 of each file it wrote.
        fingerprint: of its inputs, taken before it ran.
        failure: why there is no record, in one line.
        storage: the disk refused.
        traceback: of a failure.
    """

    record: dict[str, Any] = field(default_factory=dict)
    outputs: list[dict[str, Any]] = field(default_factory=list)
    fingerprint: str = ""
    failure: str | None = None
    storage: bool = False
    traceback: str = ""


Outcomes = Generator[tuple[str, Outcome], None, None]


def reference_of(function: Callable[..., Any]) -> str:
    """``module:function``, by which another process finds it; a script of this project is a module, too.

    Raises:
        TypeError: it is not at the top level of a module.
    """
    module = function.__module__
    if module == "__main__":
        file = Path(sys.modules["__main__"].__file__ or "").resolve()
        if file.is_relative_to(_ROOT):
            module = ".".join(file.relative_to(_ROOT).with_suffix("").parts)
    if "." in function.__qualname__:
        raise TypeError(f"{function.__qualname__}: a batch needs a function at the top level of a module")
    return f"{module}:{function.__qualname__}"


def run_task(task: Task, function: Callable[..., dict[str, Any]] | None = None) -> Outcome:
    """Run one task; its errors become an outcome.

    Args:
        task: what to run.
        function: the task's function, where it is at hand.
    """
    try:
        if function is None:
            module, _, name = task.reference.partition(":")
            function = getattr(importlib.import_module(module), name)
        mark = fingerprint(task.reference, task.arguments, task.output_folder)
        record = dict(function(**task.arguments))
        outputs = [describe_output(os.fspath(path)) for path in record.pop("outputs", [])]
        # through JSON once, so that a fresh record equals one read from a report
        return Outcome(json.loads(json.dumps(record, allow_nan=False)), outputs, mark)
    except TerminatedError:
        raise  # this process was asked to end: no fault of the patient
    except ProjectError as error:
        storage = isinstance(error, StorageError)
        return Outcome(failure=one_line(error), storage=storage, traceback=traceback.format_exc())
    except MemoryError as error:
        reason = f"{task.name}: does not fit into memory ({one_line(error)}): use fewer --workers or a larger machine"
        return Outcome(failure=reason, traceback=traceback.format_exc())
    except Exception as error:
        # a bug met by one patient must not cost the others their night; its traceback is in the log of --debug
        reason = f"{task.name}: unexpected {type(error).__name__} ({one_line(error)}): run it with --debug"
        return Outcome(failure=reason, traceback=traceback.format_exc())


def stop_if_told(outcome: Outcome) -> None:
    """Raise what concerns the whole batch: a disk that refuses one result refuses them all."""
    if outcome.storage:
        raise StorageError(outcome.failure)


def in_process(tasks: list[Task], function: Callable[..., dict[str, Any]]) -> Outcomes:
    """One task after the other, in this process."""
    for task in tasks:
        yield task.name, run_task(task, function)


# ---- worker processes


def on_processes(tasks: list[Task], count: int) -> Outcomes:
    """``count`` worker processes; one that dies takes only its own task with it and is replaced.

    Processes are spawned: a fork would copy the locks of threads that do not exist in the child. (concurrent.futures
    gives up on all tasks when a worker dies.)
    """
    context = multiprocessing.get_context("spawn")
    waiting = deque(tasks)
    busy: dict[Connection, tuple[SpawnProcess, Task]] = {}

    def hand_out(connection: Connection | None = None, process: SpawnProcess | None = None) -> None:
        if not waiting:
            if connection is not None:
                connection.close()  # the worker reads the end of its pipe, and ends
            return
        if connection is None or process is None:
            connection, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, logging.getLogger().level), daemon=True)
            process.start()
            theirs.close()
        task = waiting.popleft()
        busy[connection] = process, task
        with contextlib.suppress(OSError):  # died while starting: seen as the end of its pipe below
            connection.send(task)

    try:
        for _ in range(count):
            hand_out()
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                process, task = busy.pop(connection)
                try:
                    outcome = connection.recv()
                except (EOFError, OSError):
                    connection.close()
                    process.join()
                    yield task.name, Outcome(failure=_epitaph(task, process.exitcode))
                    hand_out()
                else:
                    hand_out(connection, process)
                    yield task.name, outcome
    finally:
        for process, _ in busy.values():
            process.terminate()
        for process, _ in busy.values():
            process.join(_GRACE_S)
            if process.is_alive():
                process.kill()


def _serve(connection: Connection, log_level: int) -> None:
    """A worker process: tasks in, outcomes out, until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, _leave)
    # as many workers as cores: threads of their own would only get in each other's way (blosc2 has one thread anyway)
    os.environ["OMP_NUM_THREADS"] = "1"
    logging.basicConfig(level=log_level)
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return
        connection.send(run_task(task))


def _leave(number: int, frame: Any) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the parent asks again, which must not disturb the way out
    raise SystemExit(int(ExitCode.SIGTERM))  # not killed: a half-written temporary file is removed on the way out


def _epitaph(task: Task, code: int | None) -> str:
    how = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
    why = ", often a lack of memory" if code == -signal.SIGKILL else ""
    return f"{task.name}: its worker process ended {how}{why}: try it again with --resume and fewer --workers"


# ---- Dask


def on_dask(tasks: list[Task], address: str) -> Outcomes:
    """The workers of the Dask cluster at ``address``; a task whose workers die again and again fails alone.

    Raises:
        ConfigurationError: nobody answers there, or there is no worker.
    """
    try:
        from distributed import Client, as_completed
    except ImportError as error:
        raise ConfigurationError(f"--scheduler {address}: needs `pip install distributed` ({error})") from error
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # our errors are single lines
    try:
        client = Client(address, timeout=_DASK_TIMEOUT_S, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigurationError(
            f"--scheduler {address}: no Dask scheduler answers there ({one_line(error)}): start `dask scheduler`"
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=_DASK_TIMEOUT_S)
        except TimeoutError as error:
            raise ConfigurationError(
                f"--scheduler {address}: no worker in {_DASK_TIMEOUT_S} s: start `dask worker {address}`"
            ) from error
        # pure=False: the same task of another batch is another task
        futures = {client.submit(run_task, task, pure=False): task for task in tasks}
        try:
            for future in as_completed(list(futures), loop=client.loop):
                task = futures.pop(future)
                lost = future.exception()
                outcome = future.result() if lost is None else Outcome(failure=_dask_reason(task, lost))
                future.release()
                yield task.name, outcome
        finally:
            client.cancel(list(futures))


def _dask_reason(task: Task, error: BaseException) -> str:
    what = f"{type(error).__name__}: {one_line(error)}"
    return f"{task.name}: lost by the Dask cluster ({what}): is the project installed on its workers? Then --resume"
