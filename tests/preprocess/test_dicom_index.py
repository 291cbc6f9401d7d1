from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydicom import Sequence as DicomSequence
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian

from errors import InputError
from preprocess.dicom_header import read_header
from preprocess.dicom_index import _quick, identify, index_tree
from tests.helpers import REAL_DATA
from tests.preprocess.dicom_factory import datasets, random_volume, series, write

REAL = REAL_DATA / "dicom"


def with_decoys(dataset: Dataset, index: int) -> None:
    """Nested sequences before the UIDs, which hold study UIDs of others, with and without a length."""
    inner, outer, plain = Dataset(), Dataset(), Dataset()
    inner.StudyInstanceUID = plain.StudyInstanceUID = "1.2.3.4"
    inner.is_undefined_length_sequence_item = True
    outer.ReferencedImageSequence = DicomSequence([inner, plain])
    outer["ReferencedImageSequence"].is_undefined_length = True
    dataset.SourceImageSequence = DicomSequence([outer])
    dataset["SourceImageSequence"].is_undefined_length = True
    dataset.ReferencedImageSequence = DicomSequence([plain])


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.1", ImplicitVRLittleEndian])
def test_the_quick_walk_sees_the_outermost_uids_only(tmp_path: Path, syntax: str) -> None:
    slices = datasets(random_volume((2, 10, 8)), with_decoys)
    for dataset in slices:
        dataset.file_meta.TransferSyntaxUID = syntax
    for path in write(tmp_path, slices):
        quick = _quick(str(path))
        (frame,) = read_header(path)
        assert quick is not None
        assert (quick.study_uid, quick.series_uid) == (frame.study_uid, frame.series_uid)
        assert quick.study_uid != "1.2.3.4"


@pytest.mark.parametrize("syntax", [DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_other_encodings_take_the_whole_parser(tmp_path: Path, syntax: str) -> None:
    slices = datasets(random_volume((1, 10, 8)))
    slices[0].file_meta.TransferSyntaxUID = syntax
    (path,) = write(tmp_path, slices)
    assert _quick(str(path)) is None
    assert identify(str(path)).series_uid == slices[0].SeriesInstanceUID


@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data/dicom")
def test_the_quick_walk_agrees_with_the_parser_on_real_files() -> None:
    paths = sorted(path for folder in REAL.iterdir() for path in sorted(folder.iterdir())[:4])
    for path in paths:
        quick, frame = _quick(str(path)), read_header(path)[0]
        assert quick is not None
        assert (quick.study_uid, quick.series_uid) == (frame.study_uid, frame.series_uid)


def test_a_tree_is_sorted_by_study_and_foreign_files_are_counted(tmp_path: Path) -> None:
    series(tmp_path / "in" / "x" / "y", random_volume((3, 10, 8)))
    series(tmp_path / "in" / "out", random_volume((3, 10, 8)))  # results of an earlier run lie there
    (tmp_path / "in" / "a.txt").write_text("text")
    os.mkfifo(tmp_path / "in" / "pipe")  # would block a reader for ever
    index = index_tree(tmp_path / "in", skip=tmp_path / "in" / "out")
    assert [len(files) for files in index.studies.values()] == [3]
    assert index.not_dicom == 2


def test_file_without_a_series_is_damaged_and_not_lost(tmp_path: Path) -> None:
    def change(dataset: Dataset, index: int) -> None:
        if index == 1:
            dataset.SeriesInstanceUID = ""

    series(tmp_path, random_volume((3, 10, 8)), change)
    index = index_tree(tmp_path)
    assert "IM0001.dcm: has no SeriesInstanceUID" in index.damaged[0]
    with pytest.raises(InputError, match="holds no DICOM image"):
        index_tree(tmp_path / "IM0001.dcm")
