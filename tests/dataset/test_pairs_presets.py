"""Public collections: small folders in their published form, joined to converted volumes by name or by keyed hash."""

from __future__ import annotations

import json

import numpy as np
import pydicom
import pytest
from hydra import compose, initialize_config_dir
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from dataset.from_config import volume_sources
from dataset.pairs_keys import pseudonym, read_key
from dataset.presets import lidc_cases, rspect_cases
from errors import ConfigurationError, InputError
from tests.helpers import ROOT

KEY = b"0123456789abcdef" * 2
COLUMNS = (
    "StudyInstanceUID,SeriesInstanceUID,SOPInstanceUID,pe_present_on_image,negative_exam_for_pe,qa_motion,qa_contrast,"
    "flow_artifact,rv_lv_ratio_gte_1,rv_lv_ratio_lt_1,leftsided_pe,chronic_pe,true_filling_defect_not_pe,rightsided_pe,"
    "acute_and_chronic_pe,central_pe,indeterminate"
)
POSITIVE, NEGATIVE, INDETERMINATE = (
    "0,0,0,0,1,0,1,0,0,0,0,0,0",
    "1,0,0,0,0,0,0,0,0,0,0,0,0",
    "0,1,0,0,0,0,0,0,0,0,0,0,1",
)


def row(study: str, series: str, image: str, on_image: int, exam: str) -> str:
    return f"{study},{series},{image},{on_image},{exam}"


@pytest.fixture
def rspect(tmp_path):
    """Three examinations of three, two and one images."""
    rows = [row("6897fa9de148", "2bfbb7fd2e8b", f"c{i}", int(i == 1), POSITIVE) for i in range(3)]
    rows += [row("014d1caa3abb", "6897fa9de149", f"d{i}", 0, NEGATIVE) for i in range(2)]
    rows += [row("ac87c57a5d04", "3c4c4cd2b32d", "e0", 0, INDETERMINATE)]
    (tmp_path / "train.csv").write_text("\n".join([COLUMNS, *rows]) + "\n")
    return tmp_path


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@pytest.mark.parametrize(
    "names",
    [
        ("6897fa9de148_2bfbb7fd2e8b.nii.gz", "014d1caa3abb_6897fa9de149.nii", "ac87c57a5d04_3c4c4cd2b32d.b2nd"),
        (
            "train/6897fa9de148/2bfbb7fd2e8b.nii.gz",
            "train/014d1caa3abb/6897fa9de149.b2nd",
            "train/ac87c57a5d04/3c4c4cd2b32d/ct.nii",
        ),
        ("6897fa9de148.nii.gz", "014d1caa3abb.nii.gz", "deep/er/ac87c57a5d04.b2nd"),
    ],
)
def test_rspect_by_name(rspect, names):
    files = [touch(rspect / "volumes" / name) for name in names]
    cases = {case.patient: case for case in rspect_cases(rspect / "volumes", rspect / "train.csv")}
    labels = {"6897fa9de148": True, "014d1caa3abb": False, "ac87c57a5d04": None}
    assert {patient: case.label for patient, case in cases.items()} == labels
    assert {case.ct for case in cases.values()} == set(files)
    assert cases["6897fa9de148"].name == "6897fa9de148_2bfbb7fd2e8b"
    assert all(case.needs_drr and case.split is None for case in cases.values())


@pytest.mark.parametrize("by", ["name", "sidecar"])
def test_rspect_by_keyed_hash(rspect, by):
    root = rspect / "volumes"
    hash_name = pseudonym(KEY, "series", "2bfbb7fd2e8b")
    volume = touch(root / (f"0123456789ab_{hash_name}.nii.gz" if by == "name" else "renamed.nii.gz"))
    (root / "renamed.json").write_text(json.dumps({"patient": "x", "study": "y", "series": hash_name}))
    (case,) = rspect_cases(root, rspect / "train.csv", KEY)
    assert (case.ct, case.label, case.patient) == (volume, True, "6897fa9de148")
    # without the key, or with another one, nothing can be joined, and the message says what is missing
    for other in (None, b"x" * 32):
        with pytest.raises(InputError, match=r"none of 1 volumes.*dataset\.key"):
            rspect_cases(root, rspect / "train.csv", other)


def test_rspect_reads_an_unlabelled_table(rspect):
    (rspect / "test.csv").write_text("StudyInstanceUID,SeriesInstanceUID,SOPInstanceUID\ns1,e1,i1\ns1,e1,i2\n")
    touch(rspect / "volumes" / "s1_e1.nii.gz")
    (case,) = rspect_cases(rspect / "volumes", rspect / "test.csv")
    assert (case.patient, case.label) == ("s1", None)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (row("6897fa9de148", "2bfbb7fd2e8b", "c9", 0, NEGATIVE), ["row 8", "contradict row 2"]),
        (row("014d1caa3abb", "6897fa9de149", "d9", 1, NEGATIVE), ["row 8", "not positive"]),
        (row("014d1caa3abb", "2bfbb7fd2e8b", "c9", 0, POSITIVE), ["row 8", "another study"]),
        (row("n", "m", "c9", 0, "1,0,0,0,0,0,0,0,0,0,0,0,1"), ["row 8", "both 1"]),
        (row("n", "m", "c9", 0, "yes,0,0,0,0,0,0,0,0,0,0,0,0"), ["row 8", "'yes'"]),
        ("n,m", ["row 8", "2 cells"]),
    ],
)
def test_rspect_refuses_a_table_that_contradicts_itself(rspect, extra, words):
    touch(rspect / "volumes" / "6897fa9de148_2bfbb7fd2e8b.nii.gz")
    with open(rspect / "train.csv", "a") as stream:
        stream.write(extra + "\n")
    with pytest.raises(InputError) as caught:
        rspect_cases(rspect / "volumes", rspect / "train.csv")
    for word in words:
        assert word in str(caught.value)


def test_rspect_refuses_two_volumes_of_a_series_and_names_foreign_ones(rspect, caplog):
    touch(rspect / "volumes" / "6897fa9de148_2bfbb7fd2e8b.nii.gz")
    touch(rspect / "volumes" / "foreign.nii.gz")
    assert len(rspect_cases(rspect / "volumes", rspect / "train.csv")) == 1
    assert "foreign.nii.gz" in caplog.text
    assert "1 of 3 series" in caplog.text
    touch(rspect / "volumes" / "6897fa9de148_2bfbb7fd2e8b.b2nd")
    with pytest.raises(InputError, match="same series 2bfbb7fd2e8b"):
        rspect_cases(rspect / "volumes", rspect / "train.csv")


def test_unconverted_and_missing_folders_are_refused(rspect):
    touch(rspect / "train" / "6897fa9de148" / "2bfbb7fd2e8b" / "c0.dcm")
    with pytest.raises(InputError, match="dicom_to_nifti"):
        rspect_cases(rspect / "train", rspect / "train.csv")
    with pytest.raises(ConfigurationError, match="no such folder"):
        rspect_cases(rspect / "none", rspect / "train.csv")
    with pytest.raises(ConfigurationError, match="no such folder"):
        lidc_cases(rspect / "none")


def dicom(path, modality: str, view: str | None = None):
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.Modality = modality
    if view is not None:
        data.ViewPosition = view
    data.Rows = data.Columns = 2
    data.BitsAllocated = data.BitsStored = 16
    data.SamplesPerPixel, data.PixelRepresentation, data.PhotometricInterpretation = 1, 0, "MONOCHROME2"
    data.PixelData = np.zeros((2, 2), np.uint16).tobytes()
    data.save_as(path)
    assert pydicom.dcmread(path).Modality == modality
    return path


@pytest.fixture
def lidc(tmp_path):
    """The published tree of two patients, the first with radiographs."""
    root = tmp_path / "LIDC-IDRI"
    for number in (1, 2):
        patient = root / f"LIDC-IDRI-{number:04d}" / "01-01-2000-30178"
        for image in (1, 2):
            dicom(patient / "3000566.000000-03192" / f"1-{image:03d}.dcm", "CT")
    study = root / "LIDC-IDRI-0001" / "01-01-2000-35511"
    dicom(study / "3000923.000000-62357" / "1-1.dcm", "CR", "PA")
    dicom(study / "3000923.000000-62357" / "1-2.dcm", "CR", "LL")
    dicom(study / "3000925.000000-62358" / "1-1.dcm", "DX")
    dicom(study / "3000926.000000-62359" / "1-1.dcm", "DX", "AP SUPINE")
    dicom(study / "3000926.000000-62359" / "1-2.dcm", "DX", "AP ERECT")
    dicom(study / "3000926.000000-62359" / "1-3.dcm", "DX", "LAO")
    (study / "3000925.000000-62358" / "1-2.dcm").write_bytes(b"no DICOM at all")
    return root


def test_lidc_volumes_and_frontal_radiographs(lidc, tmp_path):
    volumes = [
        touch(tmp_path / "volumes" / name)
        for name in ("LIDC-IDRI-0001/ct.nii.gz", "LIDC-IDRI-0002.b2nd", "LIDC-IDRI-0001/second/ct.nii.gz")
    ]
    cases = lidc_cases(tmp_path / "volumes", lidc)
    assert {case.ct for case in cases} == set(volumes)
    by_name = {case.name: case for case in cases}
    assert len(by_name) == 3
    assert (by_name["LIDC-IDRI-0002"].patient, by_name["LIDC-IDRI-0002"].needs_drr) == ("LIDC-IDRI-0002", True)
    first = [case for case in cases if case.patient == "LIDC-IDRI-0001"]
    assert len(first) == 2
    for case in first:
        assert [path.parent.name[:7] for path in case.xrays] == ["3000923", "3000925", "3000926", "3000926"]
        # no lateral or oblique view, no CT, no text
        assert [path.name for path in case.xrays] == ["1-1.dcm", "1-1.dcm", "1-1.dcm", "1-2.dcm"]
        assert case.label is None


def test_lidc_pictures_beside_the_volumes(tmp_path):
    touch(tmp_path / "LIDC-IDRI-0007" / "ct.nii.gz")
    picture = touch(tmp_path / "LIDC-IDRI-0007" / "pa.png")
    touch(tmp_path / "LIDC-IDRI-0008" / "pa.png")
    (case,) = lidc_cases(tmp_path)
    assert (case.name, case.xrays) == ("LIDC-IDRI-0007_ct", (picture,))


def test_lidc_by_keyed_hash_and_foreign_volumes(lidc, tmp_path):
    root = tmp_path / "volumes"
    touch(root / f"{pseudonym(KEY, 'patient', 'LIDC-IDRI-0001')}_0123456789ab.nii.gz")
    (case,) = lidc_cases(root, lidc, KEY)
    assert (case.patient, len(case.xrays)) == ("LIDC-IDRI-0001", 4)
    with pytest.raises(InputError, match=r"no LIDC patient.*dataset\.key"):
        lidc_cases(root, lidc)


def test_the_key_lies_beside_the_converted_folder(tmp_path):
    root = tmp_path / "nifti"
    assert read_key(None, root) is None
    (tmp_path / "nifti.key").write_bytes(KEY + b"\n")
    assert read_key(None, root) == KEY
    with pytest.raises(ConfigurationError, match=r"dataset\.key"):
        read_key(tmp_path / "none.key", root)


def configured(*overrides):
    """The ``dataset`` group as the baseline's trainer sees it."""
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "baseline_256x256x64/config")):
        return compose("base_cfg", list(overrides)).dataset


def assert_split(cases, patients):
    """Everybody is there once, on one of three sides, and no side is empty."""
    assert sorted(case.patient for case in cases) == sorted(patients)
    assert {case.split for case in cases} == {"train", "validation", "test"}


def test_rspect_from_the_command_line(tmp_path):
    studies = {f"{number:012x}": POSITIVE if number % 3 else NEGATIVE for number in range(40)}
    rows = [row(study, f"s{study}", f"i{study}", int(exam == POSITIVE), exam) for study, exam in studies.items()]
    (tmp_path / "published").mkdir()
    table = tmp_path / "published" / "labels.csv"
    table.write_text("\n".join([COLUMNS, *rows]) + "\n")
    for study in studies:
        touch(tmp_path / "volumes" / f"0123456789ab_{pseudonym(KEY, 'series', f's{study}')}.nii.gz")
    (tmp_path / "my.key").write_bytes(KEY + b"\n")
    dataset = ("dataset=rspect", f"dataset.root_dir={tmp_path}/volumes", f"dataset.csv={table}")
    cases = volume_sources(configured(*dataset, f"dataset.key={tmp_path}/my.key"))
    assert {case.patient: case.label for case in cases} == {s: exam == POSITIVE for s, exam in studies.items()}
    assert_split(cases, studies)
    with pytest.raises(InputError):  # without the key nobody is found
        volume_sources(configured(*dataset))


def test_lidc_from_the_command_line(tmp_path):
    patients = [f"LIDC-IDRI-{number:04d}" for number in range(1, 41)]
    for patient in patients:
        touch(tmp_path / "volumes" / f"{pseudonym(KEY, 'patient', patient)}_0123456789ab.nii.gz")
        dicom(tmp_path / "LIDC-IDRI" / patient / "study" / "1" / "1-1.dcm", "CR", "PA")
    (tmp_path / "volumes.key").write_bytes(KEY + b"\n")
    dataset = ("dataset=lidc", f"dataset.root_dir={tmp_path}/volumes")
    cases = volume_sources(configured(*dataset, f"dataset.xray_dir={tmp_path}/LIDC-IDRI"))
    assert_split(cases, patients)
    assert all([path.parents[2].name for path in case.xrays] == [case.patient] for case in cases)
    assert all(case.needs_drr for case in volume_sources(configured(*dataset)))
