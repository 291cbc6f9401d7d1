"""preprocess/verify.py as users run it: one table, one verdict, seconds on the second run (T24–T31)."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from dataset.store import write_store
from dataset.volume_io import Volume, write_nifti
from tests.dataset.test_nifti_header import bad_files
from tests.dataset.test_verification import damage, volume
from tests.helpers import REAL_DATA, assert_one_line_error, last_line, run

SCRIPT = "preprocess/verify.py"


def verify(folder: Path, *options: str, check: int = 0):
    cache = folder.parent / "cache.json"
    return run(SCRIPT, "--input", str(folder), "--cache", str(cache), *options, cwd=folder, tiny=False, check=check)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data" / "deep").mkdir(parents=True)
    for index in range(3):
        write_nifti(tmp_path / "data" / f"good_{index}.nii.gz", volume(index))
        write_store(tmp_path / "data" / "deep" / f"good_{index}.b2nd", volume(index), {})
    return tmp_path / "data"


def test_all_good(folder, tmp_path):
    result = verify(folder, "--output", str(tmp_path / "out"))
    assert "6 of 6 files are good (3 NIfTI, 3 store)" in result.stdout
    assert result.stderr == ""
    assert (tmp_path / "out" / "bad_files.csv").read_bytes() == b"path,kind,reason\r\n"


def test_t24_to_t27_every_bad_file_in_one_table(folder, tmp_path):
    bad = sorted(path for path in bad_files(folder) if path.exists())
    damage(folder / "deep" / "good_1.b2nd")
    bad.append(folder / "deep" / "good_1.b2nd")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    result = verify(folder, "--output", str(tmp_path / "out"), check=3)
    assert_one_line_error(result, f"{len(bad)} of {len(bad) + 5} files are bad, the first: {folder}")
    with open(tmp_path / "out" / "bad_files.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert sorted(row["path"] for row in rows) == sorted(str(path) for path in bad)
    assert {row["path"]: row["kind"] for row in rows}[str(bad[-1])] == "store"
    for row in rows:
        assert row["reason"].startswith(row["path"])
        assert row["path"] in result.stdout
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["bad_crc.nii.gz", "singular_affine.nii"])
def test_t24_to_t27_one_bad_file_is_the_last_line(folder, tmp_path, name):
    (tmp_path / "bad").mkdir()
    bad_files(tmp_path / "bad")
    shutil.copy(tmp_path / "bad" / name, folder)
    result = verify(folder, check=3)
    assert_one_line_error(result, str(folder / name))


def test_volumes_without_air_are_bad_unless_they_are_crops(folder):
    tissue = Volume(np.full((4, 8, 8), 40, np.int16), volume().affine)
    write_nifti(folder / "crop.nii", tissue)
    write_store(folder / "deep" / "crop.b2nd", tissue, {})
    for _ in range(2):  # the second time from memory
        result = verify(folder, check=3)
        assert_one_line_error(result, "2 of 8 files are bad", "crop.nii", "below -300 HU", "--allow-no-air")
        assert str(folder / "deep" / "crop.b2nd") in result.stdout
        assert "8 of 8 files are good" in verify(folder, "--allow-no-air").stdout


def test_usage_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    assert_one_line_error(verify(tmp_path / "empty", check=3), "holds no .nii")
    nowhere = run(SCRIPT, "--input", str(tmp_path / "nowhere"), cwd=tmp_path, tiny=False, check=2)
    assert_one_line_error(nowhere, "nowhere", "no such folder")


@pytest.mark.slow
def test_a_second_run_over_2000_files_takes_seconds(folder):
    # noise: of constant voxels gzip may say the same in other bits
    tiny = Volume(np.random.default_rng(0).integers(-1000, 100, (4, 8, 8)).astype(np.int16), volume().affine)
    write_nifti(folder / "one.nii.gz", tiny)
    data = (folder / "one.nii.gz").read_bytes()
    for index in range(2000):
        (folder / f"{index:04d}.nii.gz").write_bytes(data)
    verify(folder)
    damage(folder / "0007.nii.gz")
    result = verify(folder, check=3)
    seconds = float(result.stdout.rsplit(" in ", 1)[1].split()[0])
    assert seconds < 2, result.stdout
    assert str(folder / "0007.nii.gz") in last_line(result)


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="shared/data is not here: no real CT to verify")
def test_real_volumes_are_good(tmp_path):
    os.symlink(REAL_DATA / "fixtures", tmp_path / "data")
    assert "2 of 2 files are good (2 NIfTI)" in verify(tmp_path / "data").stdout
