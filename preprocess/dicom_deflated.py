"""Deflated DICOM files, inflated within bounds: pydicom would inflate a bomb whole.

Reference: DICOM PS3.5 A.5 (deflated explicit VR little endian), RFC 1951.
"""

from __future__ import annotations

import io
import zlib
from typing import BinaryIO

from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset, read_file_meta_info

from errors import InputError
from preprocess import dicom_elements as element

# A file may inflate to 8 MiB, or to 64 times its size: air shrinks 1000-fold, a chest 2-fold.
_SMALL_INFLATED, _MAX_INFLATED, _MAX_INFLATION = 2**23, 2**28, 64
_PIXEL_GROUP = 0x7FE0


def inflated(path: str) -> bytes:
    """The main data set of a deflated file, inflated within bounds.

    Raises:
        InputError: it grows beyond what an image of that size does, is truncated or damaged.
    """
    meta = read_file_meta_info(path)
    start = 132 + 12 + element.integer(meta, element.META_LENGTH, required=True)
    with open(path, "rb") as raw:
        stored_bytes = raw.seek(0, io.SEEK_END)
        raw.seek(start)
        limit = min(_MAX_INFLATED, max(_SMALL_INFLATED, _MAX_INFLATION * stored_bytes))
        engine = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            data = engine.decompress(raw.read(), limit)
        except zlib.error as error:
            raise InputError("damaged deflated data: copy it again") from error
    if len(data) >= limit:
        raise InputError(f"{stored_bytes} bytes inflate to over {limit >> 20} MiB, like a deflate bomb: not read")
    if not engine.eof:
        raise InputError("truncated, the deflated data ends too early: copy it again")
    return data


def read_deflated(path: str) -> tuple[str, BinaryIO, Dataset]:
    """Transfer syntax, the inflated stream at its pixel data, and the header before them.

    Raises:
        InputError: as `inflated`.
    """
    stream = io.BytesIO(inflated(path))
    syntax = element.text(read_file_meta_info(path), element.TRANSFER_SYNTAX)
    dataset = read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag >> 16 == _PIXEL_GROUP)
    return syntax, stream, dataset
