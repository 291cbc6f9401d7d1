"""The report of a batch: what was done, what failed, and what a later run needs to know to go on."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataset.atomic import atomic_write
from errors import InputError, StorageError

if TYPE_CHECKING:
    from preprocess.batch_workers import Outcome

# A report of thousands of patients has megabytes: it is written so often that writing takes 5 % of the time at most.
_WRITE_EVERY_S, _WRITE_SHARE = 2.0, 0.05
_READ_BYTES = 1 << 20


class Report:
    """The growing report, ``{description, function, jobs, complete, records, failures, resume}``.

    Everything but ``resume`` (fingerprints, which hold times of files) depends only on the inputs and the results:
    equal runs give equal bytes whatever ran them. Output paths are relative to the report's folder.

    Args:
        path: the JSON file.
        description: what the batch does.
        reference: ``module:function``.
        jobs: how many there are.

    Raises:
        StorageError: the folder cannot be created.
    """

    def __init__(self, path: Path, description: str, reference: str, jobs: int) -> None:
        self.path = path
        self.entries: dict[str, dict[str, Any]] = {}
        self._failures: dict[str, str] = {}
        self._head = {"description": description, "function": reference, "jobs": jobs}
        self._next_write = time.monotonic() + _WRITE_EVERY_S
        self.grown = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"{path.parent}: cannot be created ({error.strerror}): choose another --output"
            ) from error

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    @property
    def records(self) -> dict[str, dict[str, Any]]:
        """Records as the jobs returned them, by name."""
        return {
            name: {**entry["record"], "outputs": [output["path"] for output in entry["outputs"]]}
            for name, entry in sorted(self.entries.items())
        }

    @property
    def failures(self) -> dict[str, str]:
        """One line for each failure, by name."""
        return dict(sorted(self._failures.items()))

    def add(self, name: str, outcome: Outcome) -> None:
        """Keep a job's outcome, and write the report now and then."""
        self.grown = True
        if outcome.failure is not None:
            self._failures[name] = outcome.failure
        else:
            self.entries[name] = {
                "record": outcome.record,
                "outputs": outcome.outputs,
                "fingerprint": outcome.fingerprint,
            }
        if time.monotonic() >= self._next_write:
            self.write()

    def take_over(self, entries: Iterable[tuple[str, dict[str, Any]]]) -> None:
        """Keep entries of an earlier run."""
        self.entries.update(entries)

    def write(self) -> None:
        """Write the report atomically.

        Raises:
            StorageError: the disk refuses; the earlier report is untouched.
        """
        begin = time.monotonic()
        records = {
            name: {**entry["record"], "outputs": [self._relative(output) for output in entry["outputs"]]}
            for name, entry in self.entries.items()
        }
        content = {
            **self._head,
            "complete": len(self.entries) + len(self._failures) == self._head["jobs"],
            "records": records,
            "failures": self._failures,
            "resume": {name: entry["fingerprint"] for name, entry in self.entries.items()},
        }
        with atomic_write(self.path) as handle:
            handle.write(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n")
        now = time.monotonic()
        self._next_write = now + max(_WRITE_EVERY_S, (now - begin) / _WRITE_SHARE)

    def earlier(self) -> dict[str, dict[str, Any]]:
        """Entries of the report on disk, failures left out.

        Raises:
            InputError: it is not a report.
        """
        try:
            content = json.loads(self.path.read_bytes())
            return {
                name: {
                    "record": {key: value for key, value in record.items() if key != "outputs"},
                    "outputs": [{**output, "path": self._absolute(output["path"])} for output in record["outputs"]],
                    "fingerprint": content["resume"][name],
                }
                for name, record in content["records"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{self.path}: not a report of a batch: delete it, or run without --resume") from error

    def _relative(self, output: dict[str, Any]) -> dict[str, Any]:
        path = Path(output["path"])
        inside = path.is_relative_to(self.path.parent)
        return {**output, "path": path.relative_to(self.path.parent).as_posix() if inside else str(path)}

    def _absolute(self, path: str) -> str:
        return str(self.path.parent / path)


def still_holds(entry: dict[str, Any], reference: str, arguments: dict[str, Any], skip: str) -> bool:
    """Whether a job need not be repeated: same arguments and inputs, and every output as it was written."""
    try:
        if entry["fingerprint"] != fingerprint(reference, arguments, skip):
            return False
        return all(describe_output(output["path"]) == output for output in entry["outputs"])
    except (OSError, KeyError, TypeError):
        return False


def describe_output(path: str) -> dict[str, Any]:
    """Path, size in bytes and SHA-256 of a file."""
    digest = hashlib.sha256()
    size = 0
    with open(path, "rb", buffering=0) as handle:
        while block := handle.read(_READ_BYTES):
            digest.update(block)
            size += len(block)
    return {"path": str(path), "bytes": size, "sha256": digest.hexdigest()}


def fingerprint(reference: str, arguments: dict[str, Any], skip: str) -> str:
    """A hash of a job: function, arguments, and size and time of every file that the arguments name.

    Args:
        reference: ``module:function``.
        arguments: JSON-able; a text is a file only as an absolute path, since words such as "CT" must not depend on
            the working directory. Folders count with all the files below them, keys ``output…`` are not looked into.
        skip: the batch's output folder, left out where it lies in a folder of inputs.
    """
    inputs = {key: value for key, value in arguments.items() if not key.startswith("output")}
    states = {text: list(_states(text, skip)) for text in sorted(set(_strings(inputs)))}
    canonical = json.dumps([reference, arguments, states], sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _states(text: str, skip: str) -> Iterator[tuple[str, int, int]]:
    """(path, size in bytes, time of change in ns) of a file, of all files of a folder, of nothing for other words."""
    try:
        if not os.path.isabs(text) or not os.path.exists(text):
            return
        if not os.path.isdir(text):
            status = os.stat(text)
            yield "", status.st_size, status.st_mtime_ns
            return
    except (OSError, ValueError):  # a text that cannot be a path: too long, or with a zero byte
        return
    for folder, folders, files in os.walk(text):
        folders[:] = sorted(name for name in folders if os.path.join(folder, name) != skip)
        for name in sorted(files):
            path = os.path.join(folder, name)
            status = os.lstat(path)
            yield os.path.relpath(path, text), status.st_size, status.st_mtime_ns
