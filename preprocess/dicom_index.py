"""A tree of files in any order and naming -> studies: who belongs together is in the headers, not in the folders.

Only the head of each file is read here. Most are walked element by element, ten times as fast as a parser; where
that is not possible (long elements, other byte orders, deflated) the whole header is parsed.
"""

from __future__ import annotations

import logging
import os
import struct
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from errors import ConfigurationError, InputError
from preprocess.dicom_header import EXPLICIT, IMPLICIT, NotDicomError, NotImageError, read_header

log = logging.getLogger(__name__)
_HEAD_BYTES = 8192
_LONG = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
_UNDEFINED, _SEQUENCE_END = 0xFFFFFFFF, 0xE0DD
_SYNTAX, _STUDY, _SERIES = 0x00020010, 0x0020000D, 0x0020000E


@dataclass(frozen=True)
class Identity:
    """To whom a file belongs; nothing of it may be shown."""

    study_uid: str
    series_uid: str


@dataclass
class Index:
    """What a tree holds.

    Attributes:
        studies: files by StudyInstanceUID (SeriesInstanceUID where that is absent), each sorted.
        series: SeriesInstanceUIDs by the same.
        not_dicom: foreign files, ignored.
        not_image: DICOM objects without pixels (directories, reports), ignored.
        damaged: reasons for DICOM files that belong to no study because their header cannot be read.
    """

    studies: dict[str, list[str]] = field(default_factory=dict)
    series: dict[str, set[str]] = field(default_factory=dict)
    not_dicom: int = 0
    not_image: int = 0
    damaged: list[str] = field(default_factory=list)


def index_tree(root: Path, skip: Path | None = None) -> Index:
    """Sort all files below ``root`` by study; links to folders are not followed.

    Args:
        root: folder, or one file.
        skip: a folder to leave out (that of the results).

    Raises:
        ConfigurationError: it does not exist.
        InputError: it holds no DICOM image.
    """
    if not root.exists():
        raise ConfigurationError(f"{root}: no such folder: point --input at a folder of DICOM files")
    index = Index()
    files = sorted(_walk(root, skip)) if root.is_dir() else [str(root)]
    for path in tqdm(files, desc="indexing", unit="file", disable=not sys.stderr.isatty()):
        try:
            identity = identify(path)
        except NotDicomError:
            index.not_dicom += 1
        except NotImageError:
            index.not_image += 1
        except InputError as error:
            index.damaged.append(str(error))
        else:
            study = identity.study_uid or identity.series_uid
            index.studies.setdefault(study, []).append(path)
            index.series.setdefault(study, set()).add(identity.series_uid)
    if not index.studies:
        others = f"{index.not_dicom} other files, {index.not_image} DICOM objects without pixels"
        damaged = f", {len(index.damaged)} damaged: {index.damaged[0]}" if index.damaged else ""
        raise InputError(f"{root}: holds no DICOM image ({others}{damaged}): point --input at the series")
    return index


def identify(path: str) -> Identity:
    """To whom one file belongs.

    Raises:
        NotDicomError: it is no DICOM file.
        NotImageError: it has no pixels.
        InputError: its header is damaged or names no series.
    """
    identity = _quick(path)
    if identity is None:
        first = read_header(path)[0]
        identity = Identity(first.study_uid, first.series_uid)
        if not first.series_uid:
            raise InputError(
                f"{first.label}: has no SeriesInstanceUID, nobody knows what it belongs to: export it again"
            )
    return identity


def _quick(path: str) -> Identity | None:
    """The identity from the first bytes of a file, or None if that takes a real parser."""
    try:
        if not os.path.isfile(path):
            raise NotDicomError
        with open(path, "rb", buffering=0) as handle:
            head = handle.read(_HEAD_BYTES)
    except OSError:
        return None
    if head[128:132] != b"DICM":
        raise NotDicomError
    position, implicit, study, depth = 132, False, "", 0
    while position + 12 <= len(head):
        group, number = struct.unpack_from("<HH", head, position)
        if group == 0xFFFE:  # an item is entered, its end and that of its sequence are passed
            depth -= number == _SEQUENCE_END
            position += 8
            continue
        is_sequence = implicit or head[position + 4 : position + 6] == b"SQ"
        if implicit and group != 2:
            (length,) = struct.unpack_from("<I", head, position + 4)
            position += 8
        elif head[position + 4 : position + 6] in _LONG:
            (length,) = struct.unpack_from("<I", head, position + 8)
            position += 12
        else:
            (length,) = struct.unpack_from("<H", head, position + 6)
            position += 8
        if length == _UNDEFINED and is_sequence:
            depth += 1
            continue
        tag = group << 16 | number
        if (depth == 0 and tag > _SERIES) or position + length > len(head):
            return None
        if depth == 0 and tag in (_SYNTAX, _STUDY, _SERIES):
            value = head[position : position + length].decode("latin-1").strip("\0 ")
            if tag == _SERIES:
                return Identity(study, value) if value else None
            if tag == _STUDY:
                study = value
            elif value.startswith("1.2.840.10008.1.2.4") or value.startswith("1.2.840.10008.1.2.5"):
                implicit = False  # encapsulated syntaxes are explicit
            elif value in (IMPLICIT, EXPLICIT):
                implicit = value == IMPLICIT
            else:
                return None
        position += length
    return None


def _walk(root: Path, skip: Path | None) -> list[str]:
    found: list[str] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if skip is None or Path(folder, name) != skip]
        found += (os.path.join(folder, name) for name in files)
    return found
