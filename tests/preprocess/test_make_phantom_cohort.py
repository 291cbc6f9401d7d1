"""Phantom patients as files of a hospital."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pydicom
import pytest

from dataset.phantom import make_phantom, sample_patient
from dataset.xray import load_xray
from dataset.xray_drr import read_info
from errors import run_command
from preprocess import make_phantom_cohort as script
from tests.helpers import assert_one_line_error

Command = Callable[..., "CompletedProcess[str]"]

TINY = ("--patients", "3", "--held-out", "2", "--size", "24x20x40", "--spacing", "18x18x8", "--pixels", "48")


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command inside the test process; the demo's tests run it in one of its own."""

    def call(*flags: str, check: int = 0) -> CompletedProcess[str]:
        arguments = ["make_phantom_cohort", "--output", str(tmp_path / "hospital"), *TINY, *flags]
        monkeypatch.setattr(sys, "argv", arguments)
        code = run_command(lambda: script.main(script.parse_arguments()))
        out, err = capsys.readouterr()
        assert code == check, err
        return CompletedProcess(arguments, code, out, err)

    return call


@pytest.mark.slow
def test_series_radiographs_and_table(tmp_path: Path, write: Command) -> None:
    write()
    hospital = tmp_path / "hospital"
    for seed in range(3):
        files = sorted((hospital / f"ct/phantom_{seed:05d}").iterdir())
        slices = [pydicom.dcmread(file) for file in files]
        hu = np.stack([image.pixel_array * image.RescaleSlope + image.RescaleIntercept for image in slices])
        assert np.array_equal(hu, make_phantom(seed, (40, 20, 24), (8.0, 18.0, 18.0)).hu)
        assert {image.PatientID for image in slices} == {f"phantom_{seed:05d}"}
        heights = [image.ImagePositionPatient[2] for image in slices]
        assert np.allclose(np.diff(heights), 8.0)
    with (hospital / "patients.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["split"] for row in rows] == ["train", "validation", "validation"]
    assert [row["label"] == "yes" for row in rows] == [sample_patient(seed).has_pe for seed in range(3)]
    assert not rows[0]["xray"]
    for row in rows[1:]:
        picture = hospital / row["xray"]
        info = read_info(picture)
        assert info is not None
        assert info.shape_dhw == (40, 20, 24)
        assert load_xray(picture, 32).image.std() > 0.05

    before = {path: path.stat().st_mtime_ns for path in hospital.rglob("*.dcm")}
    assert "3 of 3 patients written (3 were done already)" in write("--resume").stdout
    assert before == {path: path.stat().st_mtime_ns for path in hospital.rglob("*.dcm")}
    next(iter(before)).unlink()  # what is missing is made again, the rest is not
    assert "2 were done already" in write("--resume").stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [(("--held-out", "4"), ("--held-out 4",)), (("--first-seed", "-1"), ("--first-seed",)),
     (("--size", "native"), ("--size",))],
)  # fmt: skip
def test_mistakes_end_before_anything_is_written(
    tmp_path: Path, write: Command, flags: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert_one_line_error(write(*flags, check=2), *words)
    assert not (tmp_path / "hospital").exists()
