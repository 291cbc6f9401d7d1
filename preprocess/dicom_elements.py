"""Elements of a DICOM header as plain values, from their raw bytes; what is absent or odd is empty, never an exception.

Reference: DICOM PS3.5 (value representations), PS3.6 (tags).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence
from pydicom.tag import BaseTag, Tag

from errors import InputError

META_LENGTH, MEDIA_CLASS, TRANSFER_SYNTAX = Tag(0x0002, 0x0000), Tag(0x0002, 0x0002), Tag(0x0002, 0x0010)
IMAGE_TYPE, SOP_CLASS, MODALITY = Tag(0x0008, 0x0008), Tag(0x0008, 0x0016), Tag(0x0008, 0x0060)
MANUFACTURER = Tag(0x0008, 0x0070)
PATIENT_ID, STUDY_UID, SERIES_UID = Tag(0x0010, 0x0020), Tag(0x0020, 0x000D), Tag(0x0020, 0x000E)
CONTRAST, THICKNESS, KVP, KERNEL = Tag(0x0018, 0x0010), Tag(0x0018, 0x0050), Tag(0x0018, 0x0060), Tag(0x0018, 0x1210)
CONTRAST_AGENTS, CODE_MEANING = Tag(0x0018, 0x0012), Tag(0x0008, 0x0104)
INSTANCE, POSITION, ORIENTATION = Tag(0x0020, 0x0013), Tag(0x0020, 0x0032), Tag(0x0020, 0x0037)
FRAME_OF_REFERENCE, IMAGES_IN_ACQUISITION = Tag(0x0020, 0x0052), Tag(0x0020, 0x1002)
SAMPLES, PHOTOMETRIC, FRAMES = Tag(0x0028, 0x0002), Tag(0x0028, 0x0004), Tag(0x0028, 0x0008)
ROWS, COLUMNS, PIXEL_SPACING = Tag(0x0028, 0x0010), Tag(0x0028, 0x0011), Tag(0x0028, 0x0030)
BITS_ALLOCATED, BITS_STORED, HIGH_BIT = Tag(0x0028, 0x0100), Tag(0x0028, 0x0101), Tag(0x0028, 0x0102)
PIXEL_REPRESENTATION, PADDING, PADDING_LIMIT = Tag(0x0028, 0x0103), Tag(0x0028, 0x0120), Tag(0x0028, 0x0121)
INTERCEPT, SLOPE, RESCALE_TYPE = Tag(0x0028, 0x1052), Tag(0x0028, 0x1053), Tag(0x0028, 0x1054)
LOSSY = Tag(0x0028, 0x2110)
SERIES_DESCRIPTION = Tag(0x0008, 0x103E)
# accession number, patient's name, ID, birth date, other IDs, study ID: none may show through a file name
IDENTIFIERS = (
    Tag(0x0008, 0x0050), Tag(0x0010, 0x0010), PATIENT_ID, Tag(0x0010, 0x0030), Tag(0x0010, 0x1000), Tag(0x0020, 0x0010),
)  # fmt: skip
_SHARED, _PER_FRAME = Tag(0x5200, 0x9229), Tag(0x5200, 0x9230)
# functional group -> the elements that it holds for a frame
_GROUPS = {
    Tag(0x0020, 0x9113): (POSITION,),
    Tag(0x0020, 0x9116): (ORIENTATION,),
    Tag(0x0028, 0x9110): (PIXEL_SPACING, THICKNESS),
    Tag(0x0028, 0x9145): (INTERCEPT, SLOPE, RESCALE_TYPE),
    Tag(0x0018, 0x9314): (KERNEL,),
    Tag(0x0018, 0x9325): (KVP,),
}
_WRITTEN = (INSTANCE, FRAMES, IMAGES_IN_ACQUISITION)  # whole numbers in letters (IS)
_WORD = re.compile(r"[^\W_]{2,}")
_TOKEN = re.compile(r"[^A-Za-z0-9 ._+/-]")


def text(dataset: Dataset, tag: BaseTag) -> str:
    """The value as text without padding; multiple values stay joined by backslashes."""
    value: Any = _raw(dataset, tag)
    if value is None:
        return ""
    if isinstance(value, bytes):
        return value.decode("latin-1").replace("\0", " ").strip()
    if isinstance(value, str):
        return value.replace("\0", " ").strip()
    if isinstance(value, list | tuple | MultiValue):
        return "\\".join(str(part).strip() for part in value)
    return str(value).strip()


def token(value: str, limit: int = 16) -> str:
    """A short technical word that may be shown; odd characters are dropped."""
    return _TOKEN.sub("", value).strip()[:limit]


def words(dataset: Dataset, tag: BaseTag) -> Iterator[str]:
    """The words of a name or number."""
    yield from _WORD.findall(text(dataset, tag))


def numbers(dataset: Dataset, tag: BaseTag, count: int) -> tuple[float, ...]:
    """Exactly ``count`` finite decimal numbers, or nothing."""
    parts = text(dataset, tag).split("\\")
    try:
        values = tuple(float(part) for part in parts)
    except ValueError:
        return ()
    return values if len(values) == count and all(math.isfinite(value) for value in values) else ()


def number(dataset: Dataset, tag: BaseTag) -> float | None:
    """One finite decimal number."""
    values = numbers(dataset, tag, 1)
    return values[0] if values else None


def optional_integer(dataset: Dataset, tag: BaseTag) -> int | None:
    """A whole number, binary (US, SS, UL) or written out (IS)."""
    value = _raw(dataset, tag)
    if isinstance(value, bytes) and tag not in _WRITTEN:
        if len(value) not in (2, 4):
            return None
        is_little = getattr(dataset.get_item(tag), "is_little_endian", True)
        return int.from_bytes(value, "little" if is_little else "big")
    try:
        return int(text(dataset, tag))
    except ValueError:
        return None


def integer(dataset: Dataset, tag: BaseTag, *, required: bool = False) -> int:
    """A whole number, 0 where it is absent and not required.

    Raises:
        InputError: it is required and absent.
    """
    value = optional_integer(dataset, tag)
    if value is None and required:
        raise InputError(f"element {tag} is absent or damaged: export it again")
    return value or 0


def padding(dataset: Dataset, is_signed: bool, bits_allocated: int) -> tuple[int, int] | None:
    """First and last stored value that mean "no image", as the pixels are stored.

    Writers declare it as unsigned for signed pixels, or the reverse: it is the bits that count.
    """
    first = optional_integer(dataset, PADDING)
    if first is None:
        return None
    limit = optional_integer(dataset, PADDING_LIMIT)
    low, high = sorted(
        _as_stored(value, is_signed, bits_allocated) for value in (first, first if limit is None else limit)
    )
    return low, high


def contrast_agent(dataset: Dataset) -> str:
    """The contrast agent, as text or by its code (enhanced objects have a sequence); empty where none is named."""
    if named := text(dataset, CONTRAST):
        return named
    items = dataset[CONTRAST_AGENTS].value if CONTRAST_AGENTS in dataset else None
    if not isinstance(items, Sequence):
        return ""
    return next((text(item, CODE_MEANING) or "coded" for item in items), "")


def functional_groups(dataset: Dataset, frames: int) -> list[Dataset] | None:
    """The plain elements of each frame of an enhanced object; None for a classic one.

    Raises:
        InputError: there are more or fewer groups than frames.
    """
    if _PER_FRAME not in dataset:
        return None
    per_frame = dataset[_PER_FRAME].value
    if len(per_frame) != frames:
        raise InputError(f"describes {len(per_frame)} frames and claims {frames}: export it again")
    shared = dataset[_SHARED].value if _SHARED in dataset else []
    base = _flattened(shared[0]) if len(shared) else Dataset()
    result = []
    for item in per_frame:
        flat = Dataset()
        flat.update(base)
        flat.update(_flattened(item))
        result.append(flat)
    return result


def _flattened(item: Dataset) -> Dataset:
    flat = Dataset()
    for group, tags in _GROUPS.items():
        if group in item and len(item[group].value):
            inner = item[group].value[0]
            for tag in tags:
                if tag in inner:
                    flat[tag] = inner[tag]
    return flat


def _as_stored(value: int, is_signed: bool, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if is_signed and value >> (bits - 1) else value


def _raw(dataset: Dataset, tag: BaseTag) -> object:
    if tag not in dataset:
        return None
    element = dataset.get_item(tag)
    if element is None or (isinstance(element, DataElement) and element.VR == "SQ"):
        return None
    return element.value
