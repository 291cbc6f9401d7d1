from __future__ import annotations

import gzip
import json
import subprocess
from pathlib import Path

import pytest
from pydicom.dataset import Dataset

from dataset.pairs_keys import pseudonym
from errors import ConfigurationError, InputError
from preprocess.dicom_identity import load_key, safe_label
from preprocess.dicom_sidecar import kernel, manufacturer
from tests.helpers import assert_one_line_error, run
from tests.preprocess.dicom_factory import convert, random_volume, series

CANARY = "PARROT"
_TEXT = (
    "PatientName", "PatientID", "OtherPatientIDs", "PatientAddress", "PatientComments", "AccessionNumber", "StudyID",
    "InstitutionName", "ReferringPhysicianName", "OperatorsName", "StationName", "SeriesDescription",
    "StudyDescription", "ProtocolName", "ImageComments", "Manufacturer", "ManufacturerModelName",
    "ContrastBolusAgent", "ConvolutionKernel", "BodyPartExamined", "DeviceSerialNumber", "SoftwareVersions",
    "RequestedProcedureDescription",
)  # fmt: skip
_UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID")


def plant(dataset: Dataset, index: int) -> None:
    """A canary in every text, and numbers that stand out in every UID and date."""
    for keyword in _TEXT:
        setattr(
            dataset, keyword, f"{CANARY}^{keyword}"[:16] if keyword == "ConvolutionKernel" else f"{CANARY}^{keyword}"
        )
    for keyword in _UIDS:
        setattr(dataset, keyword, f"1.2.77777777.{index if keyword == 'SOPInstanceUID' else 0}")
    for keyword in ("PatientBirthDate", "StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate"):
        setattr(dataset, keyword, "19777777")
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL", CANARY]


def everything(output: Path, result: subprocess.CompletedProcess[str]) -> str:
    """All that a run left behind: names, contents (unpacked), console."""
    parts = [result.stdout, result.stderr]
    for path in output.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        parts += [path.name, (gzip.decompress(content)[:352] if path.suffix == ".gz" else content).decode("latin-1")]
    return "\n".join(parts)


@pytest.mark.parametrize("fault", ["none", "gap", "rescale", "truncated", "mixed"])
def test_t45_no_canary_in_any_output_log_report_or_name(tmp_path: Path, fault: str) -> None:
    source, output = tmp_path / "in", tmp_path / "out"

    def change(dataset: Dataset, index: int) -> None:
        plant(dataset, index)
        if fault == "rescale":
            del dataset.RescaleSlope
        if fault == "mixed" and index == 9:
            dataset.PatientID = f"{CANARY} 2"

    paths = series(source / f"{CANARY}_JOHN", random_volume((34, 10, 8)), change)
    if fault == "gap":
        paths[7].unlink()
    if fault == "truncated":
        paths[7].write_bytes(paths[7].read_bytes()[:-9])
    for index, path in enumerate(paths):
        if path.exists():
            path.rename(path.with_name(f"{CANARY}_{19777777}_{index}.dcm"))
    result = convert(source, output, "--min-slices", "8", check=0 if fault == "none" else 3)
    text = everything(output, result)
    assert CANARY not in text.upper()
    assert "7777" not in text
    if fault == "none":
        assert len(list(output.glob("*.nii.gz"))) == 1
    else:
        assert "instance" in result.stderr  # still says which file


def test_t40_hostile_identifiers_do_not_escape_the_output_folder(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "deep" / "out"
    output.parent.mkdir()
    hostile = ["../../escaped", "/escaped", "a\0b", "..", "CON", "x" * 60, "$(touch escaped)", "%s%n", "ü\n"]
    for number, name in enumerate(hostile):

        def change(dataset: Dataset, index: int, name: str = name, number: int = number) -> None:
            dataset.PatientID = dataset.SeriesDescription = dataset.PatientName = name
            dataset.StudyInstanceUID = f"../../{number}"
            dataset.SeriesInstanceUID = f"../../{number}/{name}"[:64]

        series(source / str(number), random_volume((3, 8, 8)), change)
    arguments = ["--input", str(source), "--output", str(output), "--min-slices", "2", "--debug"]
    run("preprocess/dicom_to_nifti.py", *arguments, cwd=tmp_path, tiny=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "in"]
    assert sorted(path.name for path in output.parent.iterdir()) == ["out", "out.key"]
    names = [path.name for path in output.glob("*.nii.gz")]
    assert len(names) == len(hostile)
    assert all(set(name) <= set("0123456789abcdef_.niigz") for name in names)


def test_the_source_table_leads_back_and_may_not_lie_with_the_results(tmp_path: Path) -> None:
    source, output, table = tmp_path / "in", tmp_path / "out", tmp_path / "private.csv"
    series(source / "DOE_JOHN", random_volume((3, 8, 8)))
    convert(source, output, "--min-slices", "2", "--source-table", str(table))
    (study,) = json.loads((output / "dicom_report.json").read_text())["records"]
    assert f"{study},{source / 'DOE_JOHN'},3" in table.read_text()
    refused = convert(source, output, "--source-table", str(output / "t.csv"), check=2)
    assert_one_line_error(refused, "t.csv", "keep it apart")


def test_key_is_made_once_for_its_owner_and_kept_out_of_the_results(tmp_path: Path) -> None:
    path = tmp_path / "out.key"
    key = load_key(path, tmp_path / "out")
    assert load_key(path, tmp_path / "out") == key
    assert path.stat().st_mode & 0o077 == 0
    assert len(key) == 64
    with pytest.raises(ConfigurationError, match="folder of results"):
        load_key(tmp_path / "out" / "key", tmp_path / "out")
    (tmp_path / "short").write_text("abc")
    with pytest.raises(InputError, match="16 bytes"):
        load_key(tmp_path / "short", tmp_path / "out")


def test_hashes_depend_on_key_kind_and_value() -> None:
    names = {pseudonym(key, kind, value) for key in (b"a", b"b") for kind in ("p", "s") for value in ("1", "2")}
    assert len(names) == 8
    assert pseudonym(b"a", "p", "1") == pseudonym(b"a", "p", "1")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("IM0042.dcm", True), ("image-000123.dcm", True), ("I10", True), ("01.dcm", True), ("CT.5.2.dcm", True),
        ("DOE_JOHN.dcm", False), ("19770101.dcm", False), ("1.2.840.113619.2.1.dcm", False), ("ÄÖ.dcm", False),
        ("1234567890123", False),
    ],
)  # fmt: skip
def test_only_technical_file_names_are_shown(name: str, shown: bool) -> None:
    assert safe_label(f"/x/SMITH/{name}", instance=7) == (name if shown else "instance 7")
    assert "SMITH" not in safe_label(f"/x/SMITH/{name}")


def test_file_name_that_holds_an_identifier_is_withheld() -> None:
    assert safe_label("/x/IM4711.dcm", ["4711"], 3) == "instance 3"


@pytest.mark.parametrize("text", ["B31f", "Br40d", "FC08-H", "STANDARD", "LUNG", "YA", "I70f\\3", "D40s", "B"])
def test_kernels_are_shown(text: str) -> None:
    assert kernel(text) == text.split("\\")[0]


def test_free_text_is_not_shown() -> None:
    assert kernel("for Mr Smith") == "other"
    assert manufacturer("Hospital Smith") == "other"
    assert manufacturer("GE MEDICAL SYSTEMS") == "GE"
    assert manufacturer("") == kernel("") == ""
