"""One DICOM file -> what the project needs of its header, frame by frame; pixels stay on disk.

Values are taken from the raw bytes of the elements: that is several times faster than pydicom's conversion, and odd
values neither raise nor reach a log. Nothing here is logged, because almost every element may identify a patient.

Reference: DICOM PS3.3 (C.7.6.2 image plane, C.7.6.16 multi-frame functional groups, C.11.1 modality LUT), PS3.10.
"""

from __future__ import annotations

import io
import logging
import os
import stat
import struct
import warnings
from dataclasses import dataclass
from typing import BinaryIO

import pydicom
from pydicom import config
from pydicom.dataset import Dataset

from errors import InputError, one_line
from preprocess import dicom_elements as element
from preprocess.dicom_deflated import read_deflated
from preprocess.dicom_identity import safe_label

# pydicom's warnings and logs quote the offending value, which may be a name or a UID
config.settings.reading_validation_mode = config.IGNORE
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)

MAX_FRAME_PIXELS, MAX_FRAMES, MAX_VOXELS = 2**24, 2**13, 2**30
_HEAD_BYTES = 1024
_PIXEL_DATA = (0x7FE0, 0x0010)
_UNDEFINED = 0xFFFFFFFF
EXPLICIT = "1.2.840.10008.1.2.1"
DEFLATED = "1.2.840.10008.1.2.1.99"
IMPLICIT = "1.2.840.10008.1.2"
BIG_ENDIAN = "1.2.840.10008.1.2.2"
NATIVE = (IMPLICIT, EXPLICIT, BIG_ENDIAN, DEFLATED)
_IMAGE_CLASSES = "1.2.840.10008.5.1.4.1.1.2"  # CT, enhanced CT (.1) and legacy converted (.2)


class NotDicomError(Exception):
    """A file that never claimed to be DICOM: it is ignored and counted."""


class NotImageError(Exception):
    """A DICOM object without pixels (a report, a directory, a plan): it is ignored and counted."""


@dataclass(frozen=True, slots=True)
class Pixels:
    """Where and how a file stores its frames; ``offset`` is that of the first pixel, or of the first fragment."""

    path: str
    label: str
    syntax: str
    offset: int
    is_encapsulated: bool
    frames: int
    rows: int
    columns: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    is_signed: bool


@dataclass(frozen=True, slots=True)
class Scan:
    """How a series was made; ``text`` (its description) serves the exclusion rule and never leaves the program."""

    modality: str
    kvp: float | None
    kernel: str
    manufacturer: str
    contrast: str
    lossy: bool
    text: str


@dataclass(frozen=True, slots=True)
class Slice:
    """One frame.

    Attributes:
        patient: PatientID; for hashing and comparing only, like the UIDs.
        position_mm: LPS+ position of the first pixel's centre, or empty.
        orientation: direction of a row (along increasing columns), then of a column, LPS+; or empty.
        spacing_mm: distance between rows, then between columns; or empty.
        padding: first and last stored value that stand for "no image".
        declared: images that the header says belong to the acquisition; 0 if it does not say.
        issue: why this frame is no slice of a CT, or "".
    """

    pixels: Pixels
    frame: int
    patient: str
    study_uid: str
    series_uid: str
    frame_of_reference: str
    position_mm: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing_mm: tuple[float, ...]
    thickness_mm: float | None
    slope: float | None
    intercept: float | None
    rescale_type: str
    padding: tuple[int, int] | None
    instance: int | None
    declared: int
    image_type: tuple[str, ...]
    scan: Scan
    issue: str

    @property
    def label(self) -> str:
        """How a message may call this frame."""
        return f"{self.pixels.label} frame {self.frame + 1}" if self.pixels.frames > 1 else self.pixels.label


def read_header(path: str | os.PathLike[str]) -> list[Slice]:
    """The frames of one DICOM file.

    Raises:
        NotDicomError: no DICOM file (no preamble), or not a regular file.
        NotImageError: DICOM without an image.
        InputError: damaged, or it claims sizes that it cannot have; the message holds no identity.
    """
    path = os.fspath(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would block, a device may be endless
            raise NotDicomError
        with open(path, "rb") as raw, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            head = raw.read(_HEAD_BYTES)
            if head[128:132] != b"DICM":
                raise NotDicomError
            if DEFLATED.encode() in head:
                syntax, stream, dataset = read_deflated(path)
                return _slices(dataset, path, syntax, stream)
            raw.seek(0)
            dataset = pydicom.dcmread(raw, stop_before_pixels=True)
            syntax = element.text(dataset.file_meta, element.TRANSFER_SYNTAX)
            if not syntax:
                raise InputError("has no transfer syntax: export it again")
            return _slices(dataset, path, syntax, raw)
    except (NotDicomError, NotImageError):
        raise
    except InputError as error:
        raise InputError(one_line(f"{safe_label(path)}: {error}")) from error
    except OSError as error:
        raise InputError(f"{safe_label(path)}: cannot be read ({error.strerror})") from error
    except Exception as error:
        # pydicom answers damage with a dozen exception types (struct.error, KeyError, RecursionError, …)
        reason = f"damaged DICOM header ({type(error).__name__}): copy it again"
        raise InputError(f"{safe_label(path)}: {reason}") from error


def _slices(dataset: Dataset, path: str, syntax: str, stream: BinaryIO) -> list[Slice]:
    """The frames of a parsed header; ``stream`` stands at the pixel data."""
    identifiers = [word for tag in element.IDENTIFIERS for word in element.words(dataset, tag)]
    instance = element.optional_integer(dataset, element.INSTANCE)
    label = safe_label(path, identifiers, instance)
    value = _pixel_value(stream, syntax)
    if value is None:
        meta = getattr(dataset, "file_meta", dataset)
        classes = element.text(dataset, element.SOP_CLASS), element.text(meta, element.MEDIA_CLASS)
        if any(name.startswith(_IMAGE_CLASSES) for name in classes) or not len(dataset):
            raise InputError("the header ends before the pixels, the file is truncated: copy it again")
        raise NotImageError
    offset, length, available = value
    is_encapsulated = syntax not in NATIVE or length == _UNDEFINED
    rows, columns = (element.integer(dataset, tag, required=True) for tag in (element.ROWS, element.COLUMNS))
    frames = element.optional_integer(dataset, element.FRAMES) or 1
    if min(rows, columns, frames) < 1 or rows * columns > MAX_FRAME_PIXELS or frames > MAX_FRAMES:
        raise InputError(f"claims {frames} frames of {rows}×{columns} pixels: the header is damaged")
    if rows * columns * frames > MAX_VOXELS:
        raise InputError(f"claims {frames} frames of {rows}×{columns} pixels, more than {MAX_VOXELS >> 20} Mi voxels")
    allocated = element.integer(dataset, element.BITS_ALLOCATED, required=True)
    bits_stored = element.integer(dataset, element.BITS_STORED, required=True)
    high_bit = element.optional_integer(dataset, element.HIGH_BIT)
    high_bit = bits_stored - 1 if high_bit is None else high_bit
    is_signed = element.integer(dataset, element.PIXEL_REPRESENTATION, required=True) == 1
    pixels = Pixels(
        path, label, syntax, offset, is_encapsulated, frames, rows, columns, allocated, bits_stored, high_bit, is_signed
    )
    issue = _image_issue(dataset, pixels)
    if not issue and not is_encapsulated:
        wanted = rows * columns * frames * allocated // 8
        if (held := min(length, available)) < wanted:
            # not an exception: the series must learn of it, or its last slice would be lost without a word
            issue = f"the pixels are truncated, {held} of {wanted} bytes are there: copy it again"
    return _frames(dataset, pixels, issue)


def _pixel_value(stream: BinaryIO, syntax: str) -> tuple[int, int, int] | None:
    """(offset of the value, bytes claimed, bytes there) of the element at the stream's position."""
    order = ">" if syntax == BIG_ENDIAN else "<"
    start = stream.tell()
    head = stream.read(12)
    end = stream.seek(0, io.SEEK_END)
    if len(head) < 8 or struct.unpack(f"{order}HH", head[:4]) != _PIXEL_DATA:
        return None
    size = 8 if syntax == IMPLICIT else 12
    if len(head) < size:
        return None
    (length,) = struct.unpack(f"{order}I", head[size - 4 : size])
    return start + size, length, end - start - size


def _image_issue(dataset: Dataset, pixels: Pixels) -> str:
    samples = element.optional_integer(dataset, element.SAMPLES) or 1
    photometric = element.text(dataset, element.PHOTOMETRIC)
    if samples != 1 or photometric != "MONOCHROME2":
        return f"a picture ({samples} samples, {element.token(photometric)}), not a map of HU"
    if pixels.bits_allocated not in (8, 16, 32):
        return f"{pixels.bits_allocated} bits per pixel are not supported"
    if not (1 <= pixels.bits_stored <= pixels.high_bit + 1 <= pixels.bits_allocated):
        return f"bits stored {pixels.bits_stored}, high bit {pixels.high_bit} do not fit {pixels.bits_allocated} bits"
    return ""


def _frames(dataset: Dataset, pixels: Pixels, issue: str) -> list[Slice]:
    image_type = tuple(element.token(part) for part in element.text(dataset, element.IMAGE_TYPE).split("\\"))
    scan = Scan(
        modality=element.text(dataset, element.MODALITY),
        kvp=element.number(dataset, element.KVP),
        kernel=element.text(dataset, element.KERNEL),
        manufacturer=element.text(dataset, element.MANUFACTURER),
        contrast=element.contrast_agent(dataset),
        lossy=element.text(dataset, element.LOSSY) == "01",
        text=element.text(dataset, element.SERIES_DESCRIPTION),
    )
    common = (
        element.text(dataset, element.PATIENT_ID),
        element.text(dataset, element.STUDY_UID),
        element.text(dataset, element.SERIES_UID),
        element.text(dataset, element.FRAME_OF_REFERENCE),
    )
    padding = element.padding(dataset, pixels.is_signed, pixels.bits_allocated)
    declared = element.optional_integer(dataset, element.IMAGES_IN_ACQUISITION) or 0
    instance = element.optional_integer(dataset, element.INSTANCE)
    groups = element.functional_groups(dataset, pixels.frames)
    if groups is None:
        if pixels.frames > 1:
            issue = issue or "several frames without positions of their own"
        groups = [dataset] * pixels.frames
    return [
        Slice(
            pixels,
            index,
            *common,
            position_mm=element.numbers(group, element.POSITION, 3),
            orientation=element.numbers(group, element.ORIENTATION, 6),
            spacing_mm=element.numbers(group, element.PIXEL_SPACING, 2),
            thickness_mm=element.number(group, element.THICKNESS),
            slope=element.number(group, element.SLOPE),
            intercept=element.number(group, element.INTERCEPT),
            rescale_type=element.text(group, element.RESCALE_TYPE),
            padding=padding,
            instance=instance if pixels.frames == 1 else index + 1,
            declared=declared if pixels.frames == 1 else 0,
            image_type=image_type,
            scan=scan,
            issue=issue,
        )
        for index, group in enumerate(groups)
    ]
