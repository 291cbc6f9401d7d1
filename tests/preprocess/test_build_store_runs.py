"""preprocess/build_store.py: bad files, repeats, kills and a cluster; the same bytes every time."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace

import pytest

from dataset.store import verify_store
from dataset.volume_io import write_nifti
from errors import InputError
from preprocess.batch import Job, run_batch
from preprocess.build_store import leftovers
from tests.dataset.test_nifti_header import bad_files
from tests.dataset.test_verification import damage, volume
from tests.helpers import ROOT, assert_one_line_error, environment, last_line
from tests.preprocess.batch_jobs import work
from tests.preprocess.store_builds import build, contents, one, phantoms, source

__all__ = ["phantoms", "source"]


def test_t24_to_t27_bad_files_never_stop_the_rest(source, tmp_path):
    bad = [path for path in bad_files(source / "deep") if path.exists()]
    for path in [path for path in bad if path.with_name(f"{path.name}.gz") in bad]:
        path.unlink()  # two files of one stem would be one store
        bad.remove(path)
    result = build(source, tmp_path / "out", check=4)
    assert_one_line_error(result, f"of {len(bad) + 3} failed, the first: {source}")
    report = json.loads((tmp_path / "out" / "build_store.json").read_text())
    assert list(report["records"]) == ["a", "b", "deep/a"]
    assert len(report["failures"]) == len(bad)
    for path in bad:
        assert sum(f"{path}:" in reason for reason in report["failures"].values()) == 1, path


def test_all_bad_is_3_and_one_stem_twice_is_refused(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "ct.nii").write_bytes(b"")
    result = build(folder, tmp_path / "out", check=3)
    assert last_line(result).startswith(f"error: {folder / 'ct.nii'}: the file is empty")
    write_nifti(folder / "ct.nii.gz", volume())
    assert_one_line_error(build(folder, tmp_path / "out", check=3), f"{folder / 'ct.nii.gz'}: another volume")


def test_a_store_that_is_there_is_kept_or_named(source, tmp_path):
    target = tmp_path / "a.b2nd"
    record = one(source / "a.nii.gz", target)
    before = target.stat().st_mtime_ns, target.read_bytes()
    assert one(source / "a.nii.gz", target) == record
    assert (target.stat().st_mtime_ns, target.read_bytes()) == before
    with pytest.raises(InputError, match=r"a\.b2nd: there already with another grid: --overwrite"):
        one(source / "a.nii.gz", target, grid=[4, 5, 6])
    with pytest.raises(InputError, match="another source"):
        one(source / "b.nii", target)
    damage(target)
    with pytest.raises(InputError, match="--overwrite builds it again"):
        one(source / "a.nii.gz", target)
    assert one(source / "a.nii.gz", target, overwrite=True) == record
    assert target.read_bytes() == before[1]


def test_resume_builds_only_what_is_missing(source, tmp_path):
    out = tmp_path / "out"
    build(source, out)
    first = contents(out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.b2nd")}
    (out / "b.b2nd").unlink()
    assert "(2 were done already)" in build(source, out, "--resume", "--workers", "2").stdout
    assert contents(out) == first
    assert [path.name for path in times if path.stat().st_mtime_ns != times[path]] == ["b.b2nd"]


def test_stores_whose_volume_is_gone_are_named_and_left(source, tmp_path):
    out = tmp_path / "out"
    assert build(source, out).stderr == ""
    (source / "deep" / "a.nii.gz").unlink()
    result = build(source, out, "--resume")
    assert last_line(result).startswith(f"WARNING: {out}: 1 stores there are of no volume in --input")
    assert (out / "deep" / "a.b2nd").exists()
    assert leftovers(Namespace(input=source / "b.nii", output=out), []) == []  # one file says nothing of the others


@pytest.mark.slow
def test_the_same_bytes_wherever_it_runs(source, tmp_path):
    build(source, tmp_path / "here")
    build(source, tmp_path / "there", "--workers", "2", OMP_NUM_THREADS="4")
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


KILLED = """
import os, signal, sys
from dataset import atomic
replace = os.replace
def kill(*arguments):
    if str(arguments[1]).endswith("b.b2nd"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*arguments)
atomic.os.replace = kill
from preprocess import build_store
from errors import run_command
sys.exit(run_command(lambda: build_store.main(build_store.parse_arguments())))
"""


@pytest.mark.slow
def test_t31_a_kill_during_a_write_leaves_no_half_store(source, tmp_path):
    build(source, tmp_path / "whole")
    options = ["--input", str(source), "--output", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", KILLED, *options], env=environment(), timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in sorted((tmp_path / "out").rglob("*.b2nd"))] == ["a.b2nd"]
    verify_store(tmp_path / "out" / "a.b2nd")
    build(source, tmp_path / "out", "--resume")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")  # nor the temporary file


def test_an_output_that_cannot_be_written_is_6(source, tmp_path):
    (tmp_path / "file").touch()
    assert_one_line_error(build(source, tmp_path / "file" / "out", check=6), "cannot be created", "--output")


@pytest.mark.slow
def test_a_dask_cluster_gives_the_same_bytes(source, tmp_path):
    (source / "bad.nii").write_bytes(b"")
    build(source, tmp_path / "here", check=4)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    dask = [sys.executable, "-m", "distributed.cli"]
    logs = open(tmp_path / "dask.log", "w")  # noqa: SIM115
    common = {"env": environment(PYTHONPATH=str(ROOT)), "stdout": logs, "stderr": logs, "cwd": tmp_path}
    listen = ["--no-dashboard"]
    scheduler = [*dask[:2], "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", str(port), *listen]
    worker = [*dask[:2], "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-dashboard"]
    processes = [subprocess.Popen(line, start_new_session=True, **common) for line in (scheduler, worker, worker)]
    try:
        build(source, tmp_path / "there", "--scheduler", address, check=4)
        assert contents(tmp_path / "there") == contents(tmp_path / "here")
        (tmp_path / "there" / "a.b2nd").unlink()
        again = build(source, tmp_path / "there", "--scheduler", address, "--resume", check=4)
        assert "(2 were done already)" in again.stdout
        assert contents(tmp_path / "there") == contents(tmp_path / "here")

        ways = {"a": "good", "killed": "killed", "b": "good", "bad": "bad"}
        jobs = [
            Job(name, {"value": 1, "output": str(tmp_path / name), "how": how, "source": name})
            for name, how in ways.items()
        ]
        result = run_batch(work, jobs, scheduler=address, report=tmp_path / "report.json", description="work")
        assert list(result.records) == ["a", "b"]
        assert list(result.failures) == ["bad", "killed"]
        assert "killed: lost by the Dask cluster (KilledWorker" in result.failures["killed"]
    finally:
        for process in reversed(processes):
            os.killpg(process.pid, signal.SIGKILL)
        for process in processes:
            process.wait(30)
        logs.close()
    began = time.monotonic()
    gone = build(source, tmp_path / "nobody", "--scheduler", address, check=2)
    assert_one_line_error(gone, address, "no Dask scheduler answers")
    assert time.monotonic() - began < 60
    assert not (tmp_path / "nobody" / "build_store.json").exists()
