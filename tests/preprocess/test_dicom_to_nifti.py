from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from pydicom.dataset import Dataset

from dataset.phantom_dicom import SeriesTags, phantom_volume, write_dicom_series
from dataset.volume_io import read_nifti
from preprocess.dicom_sidecar import FIELDS, NO_PATIENT_NOTE
from tests.helpers import REAL_DATA, assert_one_line_error, run
from tests.preprocess.dicom_factory import TAGS, convert, datasets, random_volume, series, write

SCRIPT = "preprocess/dicom_to_nifti.py"
REAL = REAL_DATA / "dicom"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data/dicom")


def report_of(output: Path) -> dict:
    return json.loads((output / "dicom_report.json").read_text())


def test_phantom_patients_in_any_nesting_become_volumes(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    volume, tags = phantom_volume(1, (40, 32, 32))
    write_dicom_series(volume, source / "a" / "deep" / "folder", tags)
    other = random_volume((34, 10, 8))
    slices = datasets(other)
    write(source / "b" / "one", slices[::2], name="{}")  # one series over two folders, odd names
    write(source / "c", slices[1::2], name="{}.x")
    (source / "c" / "notes.txt").write_text("foreign")
    result = convert(source, output, "--max-thickness", "8")
    assert "2 of 2 studies converted" in result.stdout
    assert "ignored: 1 files that are not DICOM" in result.stdout
    by_shape = {read_nifti(path).hu.shape: read_nifti(path) for path in output.glob("*.nii.gz")}
    for original in (volume, other):
        converted = by_shape[original.hu.shape]
        np.testing.assert_array_equal(converted.hu, original.hu)
        np.testing.assert_allclose(converted.affine, original.affine, atol=1e-4)  # NIfTI keeps float32
    for path in output.glob("*.json"):
        if path.name != "dicom_report.json":
            assert json.loads(path.read_text())["spacing_dhw_mm"]


def test_the_affine_is_that_of_simpleitk_and_nibabel(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    series(source, random_volume((34, 10, 8)))
    convert(source, output)
    (path,) = output.glob("*.nii.gz")
    assert_same_as_simpleitk(source, path)


def assert_same_as_simpleitk(source: Path, path: Path) -> None:
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(source)))
    image = reader.Execute()
    converted = nib.load(path)
    assert isinstance(converted, nib.Nifti1Image)
    hu = np.maximum(SimpleITK.GetArrayFromImage(image), -1024)
    np.testing.assert_array_equal(np.asanyarray(converted.dataobj).transpose(2, 1, 0), hu)
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    affine[:2] *= -1
    assert converted.affine is not None
    np.testing.assert_allclose(converted.affine, affine, atol=5e-5)


def test_best_series_is_chosen_and_the_others_are_listed(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    wanted = random_volume((34, 10, 8))
    series(source / "1", wanted)
    series(source / "2", random_volume((34, 10, 8), seed=1), tags=SeriesTags(TAGS.patient, series=2, kernel="LUNG"))
    scout = SeriesTags(TAGS.patient, series=3, description="Scout")
    series(source / "3", random_volume((2, 30, 8), seed=2), tags=scout)
    convert(source, output)
    (path,) = output.glob("*.nii.gz")
    np.testing.assert_array_equal(read_nifti(path).hu, wanted.hu)
    (record,) = report_of(output)["records"].values()
    reasons = sorted(reason for entry in record["rejected"] for reason in entry["reasons"])
    assert reasons[:3] == [
        "2 slices, fewer than 32", "another series of this study is preferred", "excluded by the word 'scout'",
    ]  # fmt: skip
    everything = tmp_path / "all"
    convert(source, everything, "--all-series")
    assert len(list(everything.glob("*.nii.gz"))) == 2


def test_a_broken_series_gives_way_to_the_next_best(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    paths = series(source / "1", random_volume((36, 10, 8)))
    paths[17].unlink()
    second = random_volume((34, 10, 8), seed=1)
    series(source / "2", second, tags=SeriesTags(TAGS.patient, series=2, kernel="LUNG"))
    convert(source, output)
    (path,) = output.glob("*.nii.gz")
    np.testing.assert_array_equal(read_nifti(path).hu, second.hu)
    (record,) = report_of(output)["records"].values()
    assert "a gap of 4.0 mm" in record["rejected"][0]["reasons"][0]


def test_t15_exit_codes_4_with_some_bad_studies_and_3_with_nothing_else(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    series(source / "good", random_volume((34, 10, 8)))
    bad = series(source / "bad", random_volume((36, 10, 8)), tags=SeriesTags("P1"))
    bad[10].unlink()
    arguments = ["--input", str(source), "--output", str(output)]
    some = run(SCRIPT, *arguments, cwd=tmp_path, tiny=False, check=4)
    assert_one_line_error(
        some, str(source), "about 1 slices are missing", "a gap of 4.0 mm", "IM0009.dcm", "IM0011.dcm"
    )
    assert len(list(output.glob("*.nii.gz"))) == 1
    before = {path: path.read_bytes() for path in output.glob("*.nii.gz")}
    none = convert(source / "bad", output, check=3)
    assert_one_line_error(none, str(source / "bad"), "slices are missing")
    assert {path: path.read_bytes() for path in output.glob("*.nii.gz")} == before


def test_t22_damaged_last_file_does_not_shorten_a_volume_silently(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    paths = series(source, random_volume((34, 10, 8)))
    content = paths[-1].read_bytes()
    paths[-1].write_bytes(content[: content.index(b"\x28\x00\x10\x00")])  # ends before Rows
    assert_one_line_error(convert(source, output, check=3), "IM0033.dcm", "truncated")
    assert not list(output.glob("*.nii.gz"))


def test_damaged_file_of_no_study_is_exit_4(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    paths = series(source, random_volume((34, 10, 8)))
    (source / "IM9999.dcm").write_bytes(paths[0].read_bytes()[:200])
    assert_one_line_error(convert(source, output, check=4), "IM9999.dcm", "damaged")
    assert len(list(output.glob("*.nii.gz"))) == 1


def test_t19_tilt_is_resampled_with_its_provenance(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"

    def tilt(dataset, index: int) -> None:  # type: ignore[no-untyped-def]
        x, y, z = dataset.ImagePositionPatient
        dataset.ImagePositionPatient = [x, float(y) + index, z]

    series(source, random_volume((34, 10, 8)), tilt)
    assert_one_line_error(convert(source, output, check=3), "tilted by 26.6°", "--resample-tilt")
    convert(source, output, "--resample-tilt")
    (path,) = (path for path in output.glob("*.json") if path.name != "dicom_report.json")
    assert json.loads(path.read_text())["tilt_resampled_deg"] == pytest.approx(26.565, abs=1e-3)


def sidecar_of(output: Path) -> dict:
    (path,) = (path for path in output.glob("*.json") if path.name != "dicom_report.json")
    return json.loads(path.read_text())


def test_a_scout_in_the_first_file_does_not_refuse_its_series(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"

    def scout_first(dataset: Dataset, index: int) -> None:
        if index == 0:
            dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
            dataset.ImageOrientationPatient = ["1", "0", "0", "0", "0", "-1"]
            dataset.SliceThickness = "600"

    volume = random_volume((35, 10, 8))
    series(source, volume, scout_first)
    convert(source, output)
    (path,) = output.glob("*.nii.gz")
    np.testing.assert_array_equal(read_nifti(path).hu, volume.hu[1:])
    assert sidecar_of(output)["localizers_dropped"] == 1


def test_the_sidecar_has_its_known_fields_and_unknown_contrast_is_null(tmp_path: Path) -> None:
    for name, contrast, expected in (("a", "Omnipaque", True), ("b", "none", False), ("c", "", None)):
        tags = SeriesTags(TAGS.patient, contrast=contrast)
        series(tmp_path / name, random_volume((34, 10, 8)), tags=tags)
        convert(tmp_path / name, tmp_path / f"{name} out")
        facts = sidecar_of(tmp_path / f"{name} out")
        assert facts.keys() == FIELDS
        assert facts["contrast"] is expected
        assert facts["notes"] == []


def test_an_absent_patient_id_is_noted(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    series(source, random_volume((34, 10, 8)), lambda dataset, index: setattr(dataset, "PatientID", ""))
    for options in ((), ("--resume",)):
        assert "1 volumes have notes" in convert(source, output, *options).stdout
    assert sidecar_of(output)["notes"] == [NO_PATIENT_NOTE]
    series(tmp_path / "named", random_volume((34, 10, 8)))
    assert "notes" not in convert(tmp_path / "named", tmp_path / "named out").stdout


def test_no_dicom_is_bad_input_and_no_folder_a_bad_command(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("x")
    assert_one_line_error(convert(tmp_path / "in", tmp_path / "out", check=3), "in", "holds no DICOM image", "1 other")
    assert_one_line_error(convert(tmp_path / "nowhere", tmp_path / "out", check=2), "nowhere", "no such folder")


@pytest.mark.slow
def test_processes_give_the_same_bytes_and_resume_does_nothing_twice(tmp_path: Path) -> None:
    source, one, two = tmp_path / "in", tmp_path / "one", tmp_path / "two"
    for patient in range(3):
        series(source / str(patient), random_volume((34, 10, 8), seed=patient), tags=SeriesTags(f"P{patient}"))
    key = tmp_path / "key"
    convert(source, one, "--key", str(key))
    convert(source, two, "--key", str(key), "--workers", "2")
    volumes = sorted(path.name for path in one.glob("*.nii.gz"))
    assert len(volumes) == 3
    for name in volumes:
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert "3 were done already" in convert(source, one, "--key", str(key), "--resume").stdout


@needs_real
@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "slices", "notes"),
    [("pe_protocol_slab", 64, []), ("jpeg_lossless_shuffled", 60, ["instances 38 to 97"])],
)
def test_real_series_equal_simpleitk(tmp_path: Path, folder: str, slices: int, notes: list[str]) -> None:
    output = tmp_path / "out"
    convert(REAL / folder, output)
    (path,) = output.glob("*.nii.gz")
    assert_same_as_simpleitk(REAL / folder, path)
    facts = json.loads(path.with_suffix("").with_suffix(".json").read_text())
    assert facts["slices"] == slices
    assert [note[: len(start)] for note, start in zip(facts["notes"], notes, strict=True)] == notes


@needs_real
@pytest.mark.parametrize(
    ("folder", "reasons"),
    [
        ("missing_slices", ["about 53 slices are missing", "a gap of 216.0 mm"]),
        ("gantry_tilt_varying_gap", ["gaps of 1.08 to 7.00 mm", "tilted by 18.5°"]),
        ("multiframe", ["3 slices, fewer than 32"]),
        ("transfer_syntaxes", ["fewer than 32"]),
    ],
)
def test_t15_t19_real_series_that_are_no_volume_are_refused(tmp_path: Path, folder: str, reasons: list[str]) -> None:
    result = convert(REAL / folder, tmp_path / "out", check=3)
    for reason in reasons:
        assert reason in result.stderr
    assert not list((tmp_path / "out").glob("*.nii.gz"))
