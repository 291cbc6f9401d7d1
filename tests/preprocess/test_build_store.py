"""preprocess/build_store.py: the voxels, places and facts of a file, in a store with the same bytes every time."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.geometry import resample_to_size
from dataset.patch_sampling import read_body
from dataset.phantom import make_phantom
from dataset.store import open_store, verify_store
from dataset.verification import verify_files
from dataset.volume_io import Volume, read_nifti, to_int16_hu, write_nifti
from errors import InputError
from preprocess.batch import Job, run_batch
from preprocess.build_body import body_statistics
from preprocess.build_store import BUILDER_VERSION, build_one, grid_name, parse_grid
from tests.dataset.test_geometry import ALL_CODES, affines, shapes
from tests.dataset.test_nifti_header import bad_files
from tests.dataset.test_verification import damage, volume
from tests.helpers import REAL_DATA, ROOT, assert_one_line_error, environment, last_line, run
from tests.preprocess.batch_jobs import work

SCRIPT = "preprocess/build_store.py"


def build(source: Path, output: Path, *options: str, check: int | None = 0, **extra: str):
    return run(
        SCRIPT, "--input", str(source), "--output", str(output), *options, cwd=source, tiny=False, check=check, **extra
    )


def one(source: Path, output: Path, **changes: Any) -> dict[str, Any]:
    defaults = {"sidecar": None, "grid": None, "overwrite": False, "version": BUILDER_VERSION}
    return build_one(str(source), output=str(output), **(defaults | changes))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of an output, the report without fingerprints, which hold times and folders."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    report = json.loads(files["build_store.json"])
    del report["resume"]
    return files | {"build_store.json": json.dumps(report).encode()}


@pytest.fixture(scope="module")
def phantoms():
    made = [make_phantom(seed, (20, 32, 40)) for seed in range(3)]
    return [Volume(phantom.hu, phantom.affine) for phantom in made]


@pytest.fixture
def source(tmp_path, phantoms):
    folder = tmp_path / "nifti"
    (folder / "deep").mkdir(parents=True)
    for name, phantom in zip(["a.nii.gz", "b.nii", "deep/a.nii.gz"], phantoms, strict=True):
        write_nifti(folder / name, phantom)
    return folder


# ---------------------------------------------------------------- what a store holds


def test_native_grid_end_to_end(source, tmp_path):
    result = build(source, tmp_path / "out")
    assert "3 of 3 volumes stored" in result.stdout
    assert result.stderr == ""
    for name in ("a.nii.gz", "b.nii", "deep/a.nii.gz"):
        stored = open_store(tmp_path / "out" / (name.removesuffix(".gz").removesuffix(".nii") + ".b2nd"))
        original = read_nifti(source / name)
        np.testing.assert_array_equal(stored.hu[...], original.hu)
        np.testing.assert_array_equal(stored.affine, original.affine)
        assert stored.metadata["source"]["name"] == Path(name).name
        assert stored.metadata["grid"] == "native"
        body = body_statistics(original.hu, original.spacing_mm)
        assert {key: stored.metadata["body"][key] for key in body} == body
        where = read_body(stored.metadata, stored.hu.shape)  # what the patch sampler draws from
        assert where is not None
        assert 0 < len(where.cells) * math.prod(where.cell_vox) < 0.9 * original.hu.size
    report = json.loads((tmp_path / "out" / "build_store.json").read_text())
    assert list(report["records"]) == ["a", "b", "deep/a"]
    assert report["records"]["deep/a"]["outputs"][0]["path"] == "deep/a.b2nd"


def test_resampled_grid_keeps_the_whole_field_of_view(source, tmp_path):
    build(source, tmp_path / "out", "--grid", "24x16x10")
    stored, original = open_store(tmp_path / "out" / "a.b2nd"), read_nifti(source / "a.nii.gz")
    assert stored.hu.shape == (10, 16, 24)
    expected, affine = resample_to_size(original.hu, original.affine, (10, 16, 24))
    np.testing.assert_array_equal(stored.hu[...], to_int16_hu(expected)[0])
    np.testing.assert_array_equal(stored.affine, affine)
    # outer corners of both grids are the same points of the world
    for corner in np.ndindex(2, 2, 2):
        points = [
            volume_affine @ [*(np.array(corner) * shape - 0.5), 1]
            for volume_affine, shape in ((stored.affine, (10, 16, 24)), (original.affine, original.hu.shape))
        ]
        np.testing.assert_allclose(points[0], points[1], atol=1e-9)


def test_t28_all_48_orientations_give_the_same_store(tmp_path):
    reference = volume(shape=(5, 6, 7))
    image = nib.Nifti1Image(reference.hu.T, reference.affine[:, [2, 1, 0, 3]])
    own = nib.io_orientation(image.affine)
    assert len(set(ALL_CODES)) == 48
    checksums = set()
    for codes in ALL_CODES:
        turned = image.as_reoriented(nib.orientations.ornt_transform(own, nib.orientations.axcodes2ornt(codes)))
        nib.save(turned, tmp_path / "ct.nii")
        checksums.add(one(tmp_path / "ct.nii", tmp_path / f"{''.join(codes)}.b2nd")["checksum"])
        stored = open_store(tmp_path / f"{''.join(codes)}.b2nd")
        np.testing.assert_array_equal(stored.hu[...], reference.hu)
        np.testing.assert_allclose(stored.affine, reference.affine, atol=1e-4)
    assert len(checksums) == 1


@given(shape=shapes, file_affine=affines(), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_t29_round_trip_is_exact(tmp_path_factory, shape, file_affine, seed):
    folder = tmp_path_factory.getbasetemp()
    hu = np.random.default_rng(seed).integers(-32768, 32768, shape).astype(np.int16)
    image = nib.Nifti1Image(hu, file_affine)
    image.header.set_sform(file_affine, 1)
    nib.save(image, folder / "ct.nii")
    one(folder / "ct.nii", folder / "ct.b2nd", overwrite=True)
    original, stored = read_nifti(folder / "ct.nii"), open_store(folder / "ct.b2nd")
    np.testing.assert_array_equal(stored.hu[...], original.hu)
    np.testing.assert_array_equal(stored.affine, original.affine)
    assert stored.hu.dtype == np.int16


def test_t30_clipped_voxels_are_counted(tmp_path):
    values = np.zeros((4, 4, 4), np.float32)
    values.flat[:4] = [1.5, 40000, -40000, 32767.4]
    nib.save(nib.Nifti1Image(values, np.diag([-1.0, -1, 1, 1])), tmp_path / "ct.nii")
    one(tmp_path / "ct.nii", tmp_path / "ct.b2nd")
    stored = open_store(tmp_path / "ct.b2nd")
    assert stored.metadata["clipped_voxels"] == 2
    assert sorted(np.unique(stored.hu[...])) == [-32768, 0, 2, 32767]


def test_grids():
    assert parse_grid("native") is None
    assert parse_grid("256x256x64") == parse_grid("256×256×64") == [64, 256, 256]
    assert parse_grid("512x512x604") == [604, 512, 512]
    assert grid_name([64, 128, 256]) == "256x128x64"
    for text in ("", "256", "256x256", "0x256x64", "256x256x64x2", "axbxc", "99999x2x2", "-2x3x4"):
        with pytest.raises(ArgumentTypeError, match="native, or a size"):
            parse_grid(text)


# ---------------------------------------------------------------- facts from DICOM

SIDECAR = {"format": 1, "shape_dhw": [20, 32, 40], "kvp": 120.0, "kernel": "B31f", "patient": "0123456789ab"}


def test_the_sidecar_of_dicom_to_nifti_goes_into_the_store(source, tmp_path):
    (source / "a.json").write_text(json.dumps(SIDECAR))
    (source / "b.json").write_text(json.dumps({"PatientName": "CANARY^JANE", "Manufacturer": "GE"}))  # dcm2niix
    result = build(source, tmp_path / "out")
    assert open_store(tmp_path / "out" / "a.b2nd").metadata["sidecar"] == SIDECAR
    assert open_store(tmp_path / "out" / "b.b2nd").metadata["sidecar"] == {}
    assert f"{source / 'b.json'}: not written by dicom_to_nifti" in result.stderr
    assert b"CANARY" not in b"".join(contents(tmp_path / "out").values())


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "no readable JSON"), (json.dumps(SIDECAR | {"shape_dhw": [1, 2, 3]}), "belongs to another volume")],
)
def test_a_wrong_sidecar_is_refused(source, tmp_path, text, reason):
    (source / "a.json").write_text(text)
    with pytest.raises(InputError, match=f"^{source / 'a.json'}: .*{reason}"):
        one(source / "a.nii.gz", tmp_path / "a.b2nd", sidecar=str(source / "a.json"))
    assert not (tmp_path / "a.b2nd").exists()


# ---------------------------------------------------------------- bad files, repeats, kills


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


# ---------------------------------------------------------------- real volumes, a real cluster


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="shared/data is not here: no real CT to store")
def test_real_volumes(tmp_path):
    build(REAL_DATA / "fixtures", tmp_path / "out")
    for name in ("cip_ct64", "totalseg_pulmonary_ctacrop"):
        stored, original = (
            open_store(tmp_path / "out" / f"{name}.b2nd"),
            read_nifti(REAL_DATA / "fixtures" / f"{name}.nii.gz"),
        )
        np.testing.assert_array_equal(stored.hu[...], original.hu)
        np.testing.assert_array_equal(stored.affine, original.affine)
    body = open_store(tmp_path / "out" / "cip_ct64.b2nd").metadata["body"]
    assert 0.1 < body["share_lung"] < 0.3
    assert 0.4 < body["share_body"] < 0.9


@pytest.mark.slow
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="shared/data is not here: no real CT to store")
def test_every_real_volume(tmp_path):
    build(REAL_DATA, tmp_path / "out", "--workers", "2")
    paths = sorted((tmp_path / "out").rglob("*.b2nd"))
    assert len(paths) == len(list(REAL_DATA.rglob("*.nii.gz")))
    assert verify_files(paths, None) == []
    raw = sum(2 * int(np.prod(open_store(path).hu.shape)) for path in paths)
    assert sum(path.stat().st_size for path in paths) < 0.45 * raw


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
