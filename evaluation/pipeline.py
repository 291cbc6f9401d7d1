"""Commands one after the other, each run once: a stage whose inputs and outputs are unchanged is passed over.

What a stage left is known by size and time of its files, and recorded as ``stages/NAME.json`` when its command has
ended well. A stage that was interrupted is run again with the same command, which goes on where it stopped: the
project's commands do so by themselves, and a training is told to by ``ckpt_path=last``.
"""

from __future__ import annotations

import fcntl
import json
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from dataset.atomic import atomic_write, make_folder
from errors import ConfigurationError, ExitCode, ProjectError, StorageError, TerminatedError
from preprocess.batch_report import fingerprint

ROOT = Path(__file__).resolve().parents[1]
_RECORDS = "stages"
_DATA = "data.txt"  # in it: what all stages work on


@dataclass(frozen=True)
class Stage:
    """One command of a pipeline.

    Attributes:
        name: of its record.
        what: it does, in a few words.
        script: of this repository.
        arguments: of the script; paths in them are absolute, and shown as short as the working directory allows.
        inputs: files and folders that it reads.
        outputs: files and folders that it leaves; all exist after it.
        owns: what is removed before it starts anew because its command or its inputs are others than last time.
        training: output_dir of a training, which goes on from its last checkpoint.
        may_miss: exit 1 with all outputs made means that a threshold was missed, which is judged elsewhere.
    """

    name: str
    what: str
    script: str
    arguments: tuple[str, ...]
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]
    owns: tuple[Path, ...]
    training: Path | None = None
    may_miss: bool = False

    @property
    def key(self) -> str:
        """Hash of the command and of the state of its inputs."""
        words = json.dumps([self.script, *self.arguments])
        return fingerprint(words, {"inputs": [str(path.absolute()) for path in self.inputs]}, "")

    @property
    def left(self) -> str:
        """Hash of the state of its outputs."""
        return fingerprint("", {"paths": [str(path.absolute()) for path in self.outputs]}, "")

    @property
    def missing(self) -> list[Path]:
        """Outputs that are not there."""
        return [path for path in self.outputs if not path.exists()]


class StageError(ProjectError):
    """A stage ended badly; its own last line on stderr, just above, says why."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code  # type: ignore[assignment]  # a child's code may be any number


class Pipeline:
    """Runs stages in a folder that belongs to it.

    Args:
        folder: of all results; empty, or of an earlier run.

    Raises:
        ConfigurationError: the folder holds something else.
        StorageError: it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.records = folder / _RECORDS
        if folder.is_dir() and any(folder.iterdir()) and not self.records.is_dir():
            raise ConfigurationError(
                f"{folder}: holds files of something else, which are not touched: give an empty --output"
            )
        make_folder(self.records)
        self.count = 0

    def belongs_to(self, what: str) -> None:
        """Only one set of data works in a folder: of another one, the stages would remove what the first one made.

        Args:
            what: the data, in words that are the same each time.

        Raises:
            ConfigurationError: the folder holds results of other data.
        """
        record = self.records / _DATA
        known = record.read_text(encoding="utf-8") if record.is_file() else what
        if known != what:
            raise ConfigurationError(
                f"{self.records.parent}: holds results of {known}, not of {what}: give another --output "
                "(make demo: DEMO=folder), or remove it"
            )
        with atomic_write(record) as handle:
            handle.write(what.encode())

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Only one run works in the folder; a second one waits. SIGTERM ends the stage, too, and SIGINT of a terminal.

        The lock is handed on to the commands: one that outlives a killed pipeline still holds it.
        """
        path = self.records / "lock"
        try:
            lock = path.open("w")
        except OSError as error:
            raise StorageError(f"{path}: not written ({error.strerror}): choose another --output") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                print(f"another run works in {self.records.parent}: waiting until it has ended", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            self._lock = lock.fileno()
            before = signal.signal(signal.SIGTERM, _terminate)
            try:
                yield
            finally:
                signal.signal(signal.SIGTERM, before)

    def run(self, stage: Stage) -> None:
        """Run a stage unless it is done.

        Raises:
            StageError: its command ended badly, or left less than it should.
            TerminatedError: SIGTERM.
        """
        self.count += 1
        record = self.records / f"{stage.name}.json"
        key, known = stage.key, _read(record)
        heading = f"[{self.count}] {stage.what}"
        if known.get("key") == key and known.get("left") == stage.left and not stage.missing:
            print(f"{heading}: up to date", flush=True)
            return
        if known and known.get("key") != key:
            for path in stage.owns:
                _remove(path)
        _write(record, {"key": key})
        arguments = list(stage.arguments)
        if stage.training is not None and any((stage.training / "checkpoints").glob("*.ckpt")):
            arguments.append("ckpt_path=last")
        command = [shown(Path(sys.executable)), shown(ROOT / stage.script), *map(_shortened, arguments)]
        print(f"\n{heading}\n$ {shlex.join(command)}", flush=True)
        begin, used = time.time(), _cpu_s()
        code = self._call(command)
        seconds, cpu = time.time() - begin, _cpu_s() - used
        self._judge(stage, code, begin)
        _write(record, {"key": key, "left": stage.left, "wall_s": round(seconds, 1), "cpu_s": round(cpu, 1)})
        print(f"[{self.count}] done in {seconds:.0f} s ({cpu:.0f} s of processor time)", flush=True)

    def _call(self, command: list[str]) -> int:
        child = subprocess.Popen(command, pass_fds=(self._lock,))
        try:
            return child.wait()
        except TerminatedError:
            child.terminate()
            child.wait()
            raise
        except KeyboardInterrupt:  # a terminal sends it to the command, too, which saves and ends
            child.wait()
            raise

    @staticmethod
    def _judge(stage: Stage, code: int, begin: float) -> None:
        if code < 0:
            raise StageError(f"{stage.what}: ended by signal {-code}: the same command goes on from here", 128 - code)
        missed = stage.may_miss and code == ExitCode.BUG and not stage.missing
        # a bug leaves the outputs of an earlier run, or none
        if missed and any(path.stat().st_mtime < begin - 1 for path in stage.outputs):
            missed = False
        if code not in (ExitCode.OK, ExitCode.SKIPS) and not missed:
            raise StageError(
                f"{stage.what}: exit {code}, the line above says why: the same command goes on from here", code
            )
        if stage.missing:
            raise StageError(f"{stage.missing[0]}: {stage.what} ended well without making it", ExitCode.BUG)
        if code == ExitCode.SKIPS:
            print(f"[{stage.name}] some were left out, see above", flush=True)


def shown(path: Path) -> str:
    """A path for commands that people copy: relative where it lies below the working directory."""
    here = Path.cwd()
    absolute = path.absolute()  # links stay: a virtual environment's interpreter is one
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(absolute)


def _shortened(argument: str) -> str:
    """``/folder/file`` or ``key=/folder/file`` with the path as `shown`."""
    head, equals, tail = argument.rpartition("=")
    return f"{head}{equals}{shown(Path(tail))}" if Path(tail).is_absolute() else argument


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise TerminatedError("stopped by SIGTERM: the same command goes on from here")


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{path}: cannot be removed ({error.strerror}): remove it, it is out of date") from error


def _read(path: Path) -> dict[str, Any]:
    """A record; one that is missing or damaged counts as none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path) as handle:
        handle.write(json.dumps(content, indent=1).encode())
