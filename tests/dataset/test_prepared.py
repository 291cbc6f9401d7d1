"""Processes that prepare the same cohort at a time."""

from __future__ import annotations

import errno
import multiprocessing
import os
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from dataset.sources import PhantomSource, prepare


def prepare_slowly(cache: Path, marks: Path, together: Barrier) -> None:
    """Prepare a phantom as every process of a distributed run does, and leave a mark if it was made here."""

    class Slow(PhantomSource):
        def load(self):
            marks.joinpath(str(os.getpid())).touch()
            time.sleep(0.3)
            return super().load()

    together.wait(60)
    prepare(Slow(3, (8, 16, 16)), None, cache)


def test_two_processes_make_a_volume_once(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    context = multiprocessing.get_context("spawn")
    arguments = tmp_path / "cache", marks, context.Barrier(2)
    processes = [context.Process(target=prepare_slowly, args=arguments) for _ in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(list(marks.iterdir())) == 1
    assert prepare(PhantomSource(3, (8, 16, 16)), None, tmp_path / "cache").open().shape == (8, 16, 16)


def test_a_file_system_without_locks_prepares_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("dataset.prepared.fcntl.lockf", no_locks)
    assert prepare(PhantomSource(3, (8, 16, 16)), None, tmp_path / "cache").open().shape == (8, 16, 16)
