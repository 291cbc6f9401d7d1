"""Public collections as they are published, joined to the volumes that were converted from them.

**RSPECT** (RSNA-STR Pulmonary Embolism Detection, Colak et al. 2021, doi 10.1148/ryai.2021200254): ``train.csv`` has
one row per image of ``train/<study>/<series>/<image>.dcm``. Examination labels are repeated in each row, and exactly
one of three holds: negative (``negative_exam_for_pe``), ``indeterminate`` (no label here), or positive. The collection
names no patients: a study is one.

**LIDC-IDRI** (Armato et al. 2011, doi 10.1118/1.3528204): ``LIDC-IDRI-0001/<study>/<series>/*.dcm``, 1,010 patients, CT
and, for 290 of them, radiographs (CR, DX) in the same tree. Nobody labelled emboli.

A volume is recognised by identifiers in its path below ``root_dir`` (``<study>_<series>.nii.gz``,
``<study>/<series>.b2nd``, ``<study>.nii.gz``, ``LIDC-IDRI-0001/…``), or, with the key of the conversion, by hashes
in its name (``<patient>_<series>.nii.gz``) or its sidecar.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dataset.pairs_case import CTCase, case_name, read_sidecar, volume_stem, with_unique_names
from dataset.pairs_keys import pseudonym
from dataset.pairs_table import table_rows
from dataset.verification import find_volumes
from dataset.xray_dicom import FRONTAL
from errors import ConfigurationError, InputError

log = logging.getLogger(__name__)
KeyT = TypeVar("KeyT")

_STUDY, _SERIES = "StudyInstanceUID", "SeriesInstanceUID"
_EXAM_LABELS = ("negative_exam_for_pe", "indeterminate")
_ON_IMAGE = "pe_present_on_image"
_LIDC_PATIENT = re.compile(r"LIDC-IDRI-\d{4}(?!\d)")
_LIDC_PATIENTS = [f"LIDC-IDRI-{number:04d}" for number in range(1, 1013)]
_PICTURES = (".png", ".jpg", ".jpeg")
_RADIOGRAPHY = ("CR", "DX", "RG")
_CONVERT = "convert the collection's DICOM with preprocess/dicom_to_nifti.py first"
_OR_KEY = "or give dataset.key, the key file of the conversion that hashed the names"


@dataclass(frozen=True)
class _Exam:
    """A series of RSPECT: who, which, and what was found; ``row`` is the first one that says so."""

    study: str
    series: str
    label: bool | None
    row: int


def rspect_cases(root: Path, train_csv: Path, key: bytes | None = None) -> list[CTCase]:
    """The RSNA pulmonary embolism collection.

    Args:
        root: folder of converted volumes.
        train_csv: ``train.csv`` as published, or ``test.csv``, which has no labels.
        key: of the conversion, if it hashed the names.

    Returns:
        One case per series that has a volume; the patient is the study.

    Raises:
        InputError: a table that contradicts itself, no volume that belongs to it, or two of one series.
    """
    exams = _read_exams(train_csv)
    series = {exam.series: exam for exam in exams}
    by_study: dict[str, list[_Exam]] = {}
    for exam in exams:
        by_study.setdefault(exam.study, []).append(exam)

    def named_by_study(relative: Path) -> _Exam | None:
        # a study names a volume only where it has one series, as it always has in the published table
        exams_of_study = by_study.get(volume_stem(relative), [])
        return exams_of_study[0] if len(exams_of_study) == 1 else None

    volumes = _volumes(root)
    found: dict[_Exam, Path] = {}
    foreign: list[Path] = []
    for path, joined in _join(root, volumes, "series", series, key, named_by_study):
        if joined is None:
            foreign.append(path)
        elif joined in found:
            raise InputError(f"{path}: {found[joined]} is the same series {joined.series}: keep one of them")
        else:
            found[joined] = path
    if not found:
        raise InputError(
            f"{root}: none of {len(volumes)} volumes belongs to a series of {train_csv}, by name or sidecar: "
            f"{_CONVERT}, {_OR_KEY}"
        )
    if foreign:
        log.warning("%s: %d volumes are not in %s, the first %s", root, len(foreign), train_csv, foreign[0])
    if len(found) < len(exams):
        log.warning("%s: %d of %d series of %s have a volume", root, len(found), len(exams), train_csv)
    return [
        CTCase(case_name("", Path(f"{exam.study}_{exam.series}")), exam.study, path, label=exam.label)
        for exam, path in sorted(found.items(), key=lambda item: (item[0].study, item[0].series))
    ]


def _read_exams(path: Path) -> list[_Exam]:
    """One entry per series; its rows must agree."""
    exams: dict[str, _Exam] = {}
    stated: dict[str, tuple[str, ...]] = {}
    for row, cells in table_rows(path, None, (_STUDY, _SERIES)):
        study, series = cells[_STUDY], cells[_SERIES]
        said = tuple(cells.get(column, "") for column in _EXAM_LABELS)
        exam = exams.get(series)
        if exam is None:
            exam = exams[series] = _Exam(study, series, _exam_label(path, row, said), row)
            stated[series] = said
        if exam.study != study:
            raise InputError(
                f"{path}: row {row}: series {series} is of another study in row {exam.row}: take the original"
            )
        if stated[series] != said:
            raise InputError(
                f"{path}: row {row}: the labels of study {study} contradict row {exam.row}: take the original file"
            )
        if exam.label is not True and cells.get(_ON_IMAGE) == "1":
            raise InputError(
                f"{path}: row {row}: an image of study {study} shows an embolism, but the examination is not positive: "
                "take the original file"
            )
    if not exams:
        raise InputError(f"{path}: holds no row below its header: take the original file")
    return list(exams.values())


def _exam_label(path: Path, row: int, said: tuple[str, ...]) -> bool | None:
    negative, indeterminate = said
    if said == ("", ""):
        return None
    if not {negative, indeterminate} <= {"0", "1"} or said == ("1", "1"):
        raise InputError(
            f"{path}: row {row}: negative_exam_for_pe={negative!r} and indeterminate={indeterminate!r} are not 0 or 1, "
            "or both 1: take the original file"
        )
    return None if indeterminate == "1" else negative == "0"


def lidc_cases(root: Path, xray_root: Path | None = None, key: bytes | None = None) -> list[CTCase]:
    """LIDC-IDRI: converted volumes, and the frontal radiographs of the same patients.

    Args:
        root: folder of converted volumes.
        xray_root: the published tree, or pictures (.png, .jpg) with the patient in their path; default ``root``.
        key: of the conversion, if it hashed the names.

    Raises:
        InputError: no volume, or one of an unknown patient.
    """
    volumes = _volumes(root)
    patients: dict[Path, str] = {}
    for path, patient in _join(root, volumes, "patient", {name: name for name in _LIDC_PATIENTS}, key, _lidc_patient):
        if patient is None:
            raise InputError(
                f"{path}: of no LIDC patient, by path (LIDC-IDRI-0001/…) or sidecar: move it elsewhere, {_OR_KEY}"
            )
        patients[path] = patient
    xrays: dict[str, list[Path]] = {}
    for picture in _radiographs(xray_root or root):
        if patient := _lidc_patient(picture.relative_to(xray_root or root)):
            xrays.setdefault(patient, []).append(picture)
    return with_unique_names(
        CTCase(case_name(patient, path), patient, path, tuple(xrays.get(patient, ())))
        for path, patient in patients.items()
    )


def _lidc_patient(relative: Path) -> str | None:
    found = _LIDC_PATIENT.search(relative.as_posix())
    return found[0] if found else None


def _radiographs(root: Path) -> Iterator[Path]:
    """Pictures, and frontal DICOM radiographs; one readable file says what its whole folder (a series) holds."""
    if not root.is_dir():
        raise ConfigurationError(f"{root}: no such folder: point dataset.xray_dir at the radiographs")
    modalities: dict[Path, str] = {}
    for path in sorted(root.rglob("*")):
        suffix = path.suffix.lower()
        if suffix in _PICTURES:
            yield path
        elif suffix == ".dcm" and modalities.get(path.parent) in (None, *_RADIOGRAPHY):
            modality, view = _modality_and_view(path)
            if modality is None:
                continue
            modalities[path.parent] = modality
            # lateral and oblique views show another projection than the frontal one that models are conditioned on
            if modality in _RADIOGRAPHY and (view is None or view in FRONTAL):
                yield path


def _modality_and_view(path: Path) -> tuple[str | None, str | None]:
    """Two elements of a DICOM header, None where missing or empty; both for a file that is no DICOM."""
    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["Modality", "ViewPosition"])
        modality, view = (str(header.get(name) or "").strip().upper() for name in ("Modality", "ViewPosition"))
        return modality or None, view or None
    except (InvalidDicomError, OSError, ValueError, TypeError, AttributeError, KeyError, EOFError) as error:
        log.warning("%s: no usable DICOM, left out (%s)", path, error)
        return None, None


def _volumes(root: Path) -> list[Path]:
    if not root.is_dir():
        raise ConfigurationError(f"{root}: no such folder: point dataset.root_dir at the converted volumes")
    return find_volumes(root, hint=_CONVERT)


def _join(
    root: Path,
    volumes: Iterable[Path],
    kind: str,
    known: dict[str, KeyT],
    key: bytes | None,
    by_path: Callable[[Path], KeyT | None],
) -> Iterator[tuple[Path, KeyT | None]]:
    """Yield each volume with what its path, or a hash in its path or sidecar, says it is."""
    hashed = {} if key is None else {pseudonym(key, kind, text): value for text, value in known.items()}
    for path in volumes:
        relative = path.relative_to(root)
        # the innermost name first; a name may hold several identifiers
        parts = [volume_stem(path), *reversed(relative.parts[:-1])]
        names = [name for part in parts for name in (part, *part.split("_"))]
        found = by_path(relative)
        for table in (known, hashed):
            if found is None:
                found = next((table[name] for name in names if name in table), None)
        if found is None and hashed:
            found = hashed.get(str(read_sidecar(path).get(kind)))
        yield path, found
