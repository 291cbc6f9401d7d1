"""Batches: bad patients, dying workers, signals and repeats never lose or change what was done."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from errors import ConfigurationError, ExitCode, InputError, StorageError
from preprocess.batch import BatchResult, Job, add_batch_arguments, run_batch, summarise
from preprocess.batch_report import fingerprint
from tests.helpers import ROOT, environment, wait_for
from tests.preprocess.batch_jobs import work


def jobs(folder: Path, ways: dict[str, str]) -> list[Job]:
    folder.mkdir(exist_ok=True)
    return [
        Job(name, {"value": index, "output": str(folder / name), "how": how})
        for index, (name, how) in enumerate(ways.items())
    ]


def batch(folder: Path, ways: dict[str, str], **options: Any) -> BatchResult:
    return run_batch(work, jobs(folder, ways), report=folder / "report.json", description="work", **options)


def calls(folder: Path) -> dict[str, int]:
    return {path.stem: len(path.read_text()) for path in folder.glob("*.calls")}


GOOD = {"c": "good", "a": "good", "b": "good"}


@pytest.mark.parametrize("workers", [0, 2])
def test_records_failures_and_report(tmp_path, workers):
    result = batch(tmp_path, {"b": "good", "z": "bad", "a": "good", "y": "bug", "x": "memory"}, workers=workers)
    assert list(result.records) == ["a", "b"]
    assert result.records["a"] == {"value": [2, 0.1], "outputs": [str(tmp_path / "a")]}
    assert list(result.failures) == ["x", "y", "z"]
    assert result.failures["z"] == "None: truncated: copy it again"
    assert "unexpected KeyError" in result.failures["y"]
    assert "\n" not in result.failures["y"]
    assert result.exit_code is ExitCode.SKIPS
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["complete"]
    assert report["failures"] == result.failures
    output = report["records"]["a"]["outputs"][0]
    # sha256 of "2"
    digest = "d4735e3a265e16eee03f59718b9b5d03019c07d8b6c51f90da3a666eec13ab35"
    assert output == {"path": "a", "bytes": 1, "sha256": digest}


def test_exit_codes(tmp_path):
    assert batch(tmp_path, GOOD).exit_code == 0
    assert batch(tmp_path, {"a": "bad", "b": "bug"}).exit_code == 3
    assert batch(tmp_path, {}).exit_code == 0


def test_every_way_gives_the_same_report(tmp_path):
    """All but the fingerprints, which hold times and folders."""
    texts = set()
    for workers in (0, 1, 3):
        folder = tmp_path / str(workers)
        batch(folder, {"d": "bug", **GOOD}, workers=workers)
        report = json.loads((folder / "report.json").read_text())
        del report["resume"]
        texts.add(json.dumps(report))
    assert len(texts) == 1


@pytest.mark.parametrize(("how", "reason"), [("killed", "signal 9"), ("exit", "exit code 7")])
def test_a_worker_that_dies_takes_only_its_own_job(tmp_path, how, reason):
    ways = {"a": "good", "dead": how, "b": "good", "dead too": how, "c": "good"}
    result = batch(tmp_path, ways, workers=2)
    assert list(result.records) == ["a", "b", "c"]
    assert list(result.failures) == ["dead", "dead too"]
    assert reason in result.failures["dead"]
    assert result.exit_code == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_a_full_disk_stops_the_batch_and_keeps_the_report(tmp_path, workers):
    with pytest.raises(StorageError, match="disk is full"):
        batch(tmp_path, {"a": "good", "b": "disk", "c": "good"}, workers=workers)
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["records"]) == ["a"]
    assert not report["complete"]
    assert calls(tmp_path) == {"a": 1}


def test_what_is_not_json_is_a_bug_of_one_job(tmp_path):
    result = batch(tmp_path, {"a": "not json", "b": "good"})
    assert "not JSON serializable" in result.failures["a"]
    assert list(result.records) == ["b"]


def test_names_must_differ(tmp_path):
    job = jobs(tmp_path, {"a": "good"})[0]
    with pytest.raises(ConfigurationError, match="two jobs are called 'a'"):
        run_batch(work, [job, job], report=tmp_path / "report.json", description="work")
    with pytest.raises(ConfigurationError, match="--workers -1"):
        batch(tmp_path, GOOD, workers=-1)


# ---------------------------------------------------------------- resume


def test_resume_repeats_only_what_must_be(tmp_path):
    first = batch(tmp_path, {**GOOD, "bad": "bad"})
    again = batch(tmp_path, {**GOOD, "bad": "bad"}, resume=True)
    assert again == first
    assert again.resumed == 3
    assert calls(tmp_path) == {"a": 1, "b": 1, "c": 1}

    (tmp_path / "a").write_text("9")  # of the same size
    (tmp_path / "b").unlink()
    third = batch(tmp_path, {**GOOD, "bad": "good"}, resume=True)
    assert third.exit_code == 0
    assert third.resumed == 1
    assert calls(tmp_path) == {"a": 2, "b": 2, "c": 1, "bad": 1}
    assert (tmp_path / "a").read_text() == "1"


def test_resume_sees_changed_arguments_and_inputs(tmp_path):
    scans, out = tmp_path / "scans", tmp_path / "out"
    (scans / "deep").mkdir(parents=True)
    out.mkdir()
    slice_file = scans / "deep" / "1.dcm"
    slice_file.write_text("12")

    def go(value: int = 1) -> int:
        one = [Job("p", {"value": value, "source": str(scans), "output": str(out / "p")})]
        return run_batch(work, one, report=out / "report.json", resume=True, description="work").resumed

    assert [go(), go()] == [0, 1]
    assert [go(value=2), go(value=2)] == [0, 1]
    slice_file.write_text("123")
    assert [go(value=2), go(value=2)] == [0, 1]
    status = slice_file.stat()
    os.utime(slice_file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert [go(value=2), go(value=2)] == [0, 1]
    (scans / "2.dcm").touch()
    assert [go(value=2), go(value=2)] == [0, 1]


def test_words_are_no_paths_whatever_lies_in_the_working_directory(tmp_path, monkeypatch):
    arguments = {"rules": {"modality": "CT", "exclude_words": ["scout"]}, "views": ["frontal"]}
    monkeypatch.chdir(tmp_path)
    before = fingerprint("module:function", arguments, "")
    for word in ("CT", "scout", "frontal"):
        (tmp_path / word).mkdir()
        (tmp_path / word / "1.dcm").touch()
    assert fingerprint("module:function", arguments, "") == before


def test_output_inside_the_input_does_not_make_a_job_new(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    one = [Job("p", {"value": 1, "source": str(tmp_path), "output": str(out / "p")})]
    run_batch(work, one, report=out / "report.json", description="work")
    assert run_batch(work, one, report=out / "report.json", resume=True, description="work").resumed == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"records": {"a": 1}}', '{"records": {"a": {"outputs": []}}}'])
def test_a_damaged_report_is_named(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(InputError, match=r"report\.json: not a report"):
        batch(tmp_path, GOOD, resume=True)
    assert (tmp_path / "report.json").read_text() == text
    assert batch(tmp_path, GOOD).exit_code == 0


def test_a_batch_that_cannot_begin_leaves_the_earlier_report(tmp_path):
    batch(tmp_path, GOOD)
    before = (tmp_path / "report.json").read_bytes()
    with pytest.raises(ConfigurationError, match="no Dask scheduler answers"):
        batch(tmp_path, GOOD, scheduler="nonsense://")
    assert (tmp_path / "report.json").read_bytes() == before


def test_a_report_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be created"):
        run_batch(work, [], report=tmp_path / "file" / "report.json", description="work")


# ---------------------------------------------------------------- signals and the command line

SCRIPT = """
import sys
from pathlib import Path
from errors import run_command
from preprocess.batch import Job, run_batch
from tests.preprocess.batch_jobs import work
if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.mkdir()
    jobs = [Job(name, dict(value=1, output=str(out / name), how=how)) for name, how in (("a", "good"), ("b", "sleep"))]
    options = dict(workers=int(sys.argv[2]), report=out / "report.json", description="work")
    sys.exit(run_command(lambda: run_batch(work, jobs, **options).exit_code))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("workers", [0, 2])
def test_signals_keep_the_report(tmp_path, number, code, workers):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, str(script), str(out), str(workers)],
        env=environment(PYTHONPATH=str(ROOT)),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(out / "b.started", process)
    wait_for(out / "a.calls", process)
    time.sleep(0.2)
    os.killpg(process.pid, number)  # as Ctrl-C does: to all at once
    stderr = process.communicate(timeout=30)[1]
    assert process.returncode == code
    assert "Traceback" not in stderr
    assert stderr.strip().splitlines()[-1].startswith("error: ")
    assert list(json.loads((out / "report.json").read_text())["records"]) == ["a"]
    end = time.monotonic() + 10
    while alive := in_group(process.pid):  # the resource tracker of multiprocessing needs a moment
        assert time.monotonic() < end, alive
        time.sleep(0.05)


def in_group(group: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def test_arguments_and_verdict(tmp_path, capsys, monkeypatch):
    parser = argparse.ArgumentParser()
    add_batch_arguments(parser)
    monkeypatch.chdir(tmp_path)
    arguments = parser.parse_args(["--input", "in", "--output", "~/out", "--workers", "2", "--resume"])
    assert arguments.input == tmp_path / "in"
    assert arguments.output == Path.home() / "out"
    assert (arguments.workers, arguments.scheduler, arguments.resume, arguments.debug) == (2, None, True, False)

    assert summarise(batch(tmp_path, {"a": "good", "b": "bad"}), "patients converted") == 4
    printed = capsys.readouterr()
    assert "1 of 2 patients converted" in printed.out
    assert printed.err.splitlines() == ["error: None: truncated: copy it again"]
    assert summarise(batch(tmp_path, {"a": "bad", "b": "bad"}), "patients converted") == 3
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: 2 of 2 failed, the first: None: truncated")
