"""The frame of a store file, checked before the compression library sees it.

blosc2 trusts what a frame claims: it allocates what the header says, and it knows metalayers that stand for
expressions and references to other files. So every claim is compared with the file's real size first, and a frame that
holds anything but one int16 array and our record is refused. Nothing here decompresses voxels.

Reference: the contiguous frame of C-Blosc2 and the ``b2nd`` metalayer (README_CFRAME_FORMAT.rst,
README_B2ND_METALAYER.rst).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import blosc2
import msgpack

from errors import InputError, one_line

RECORD_NAME = "xray2ctpa"
MAX_RECORD_BYTES = 1 << 20
# 1024³ voxels, as for NIfTI; with the limit on padding it bounds what a frame can make anyone allocate.
MAX_VOXELS = 2**30
MAX_CHUNK_VOXELS = 2**24
_MAGIC = b"b2frame\x00"
_PREFIX_BYTES = 128
_MAX_HEADER_BYTES = 4096
_MAX_TRAILER_BYTES = MAX_RECORD_BYTES + 4096
_TRAILER_END_BYTES = 23  # 0xce, length of the trailer as uint32, fingerprint of 18 bytes
_CHUNK_HEADER_BYTES = 32
_READ_BYTES = 1 << 20
_DAMAGED = "damaged or truncated: build it again"

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Frame:
    """What a store file says of itself.

    Attributes:
        shape: voxels (D, H, W).
        chunks: of the array.
        blocks: of a chunk.
        record: our JSON record.
        data: where the compressed voxels begin and end in the file.
    """

    shape: Shape
    chunks: Shape
    blocks: Shape
    record: dict[str, Any]
    data: tuple[int, int]


def data_sha256(source: BinaryIO, data: tuple[int, int]) -> str:
    """SHA-256 of the compressed voxels, as they lie in a frame.

    Raises:
        OSError: they cannot be read.
    """
    digest = hashlib.sha256()
    source.seek(data[0])
    for start in range(*data, _READ_BYTES):
        digest.update(source.read(min(_READ_BYTES, data[1] - start)))
    return digest.hexdigest()


def frame_sha256(frame: bytes) -> str:
    """`data_sha256` of a frame that was just made."""
    (trailer_bytes,) = struct.unpack(">xI", frame[-_TRAILER_END_BYTES:][:5])
    data = struct.unpack(">i", frame[11:15])[0], len(frame) - trailer_bytes
    return hashlib.sha256(memoryview(frame)[slice(*data)]).hexdigest()


def read_frame(path: Path) -> Frame:
    """Check header and trailer of a store file against its size and each other.

    Memory stays below some MB and nothing is run, whatever the file holds.

    Raises:
        InputError: missing, no store of this project, damaged or truncated.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError("not a file: give a .b2nd store")
        with open(path, "rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            prefix = handle.read(_PREFIX_BYTES)
            if size == 0:
                raise InputError("the file is empty: build it again")
            if len(prefix) < _PREFIX_BYTES or prefix[2:10] != _MAGIC:
                raise InputError("no .b2nd store: build it with preprocess/build_store.py")
            header_bytes = struct.unpack(">i", prefix[11:15])[0]
            if not len(_MAGIC) < header_bytes <= min(_MAX_HEADER_BYTES, size):
                raise InputError(_DAMAGED)
            header = prefix + handle.read(max(0, header_bytes - len(prefix)))
            handle.seek(-_TRAILER_END_BYTES, os.SEEK_END)
            trailer_bytes = struct.unpack(">xI", handle.read(5))[0]
            if not _TRAILER_END_BYTES < trailer_bytes <= min(_MAX_TRAILER_BYTES, size - header_bytes):
                raise InputError(_DAMAGED)
            handle.seek(-trailer_bytes, os.SEEK_END)
            trailer = handle.read(trailer_bytes)
        shape, chunks, blocks = _parse_header(header[:header_bytes], size, trailer_bytes)
        record = _parse_trailer(trailer)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or one_line(error)})") from error
    except (ValueError, TypeError, KeyError, IndexError, struct.error, RuntimeError, RecursionError) as error:
        # what msgpack and json raise on bytes that are none of theirs
        raise InputError(f"{path}: {_DAMAGED} ({one_line(error)})") from error
    return Frame(shape, chunks, blocks, record, (header_bytes, size - trailer_bytes))


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise InputError(f"{what}: {_DAMAGED}")


def _unpack(data: bytes) -> Any:
    """One msgpack value that fills ``data``; no extension type is ever interpreted."""
    return msgpack.unpackb(data, raw=True, strict_map_key=False)


def _parse_header(header: bytes, size: int, trailer_bytes: int) -> tuple[Shape, Shape, Shape]:
    fields = _unpack(header)
    _require(isinstance(fields, list) and len(fields) == 14, "header without its fields")
    _, header_bytes, frame_bytes, flags, nbytes, cbytes, itemsize, _, chunk_bytes, *_, has_record, _, layers = fields
    _require(frame_bytes == size, f"holds {size} bytes, its header says {frame_bytes}")
    # anything but one contiguous frame (bits 0-3 version, 4 contiguous; sparse ones are folders)
    _require(flags[1] & 0x07 == 0 and itemsize == 2 and has_record is True, "not one int16 array with its record")
    _require(0 <= cbytes <= size - header_bytes - trailer_bytes, "more compressed data than the file holds")
    _, names, contents = layers
    # other metalayers make blosc2 build expressions, proxies and references
    if list(names) != [b"b2nd"] or len(contents) != 1:
        raise InputError("holds more than one array: build it with preprocess/build_store.py")
    version, dimensions, shape, chunks, blocks, dtype_format, dtype = _unpack(contents[0])
    _require(version == 0 and dimensions == 3 and dtype_format == 0 and dtype == b"<i2", "not int16 (D, H, W)")
    shape, chunks, blocks = (_lengths(sizes) for sizes in (shape, chunks, blocks))
    _require(math.prod(shape) <= MAX_VOXELS, f"claims {list(shape)} voxels, more than {MAX_VOXELS}")
    padded_chunk = math.prod(math.ceil(c / b) * b for c, b in zip(chunks, blocks, strict=True))
    fits = all(b <= c <= n for b, c, n in zip(blocks, chunks, shape, strict=True))
    _require(fits and padded_chunk <= MAX_CHUNK_VOXELS, f"chunks {list(chunks)} and blocks {list(blocks)}")
    count = math.prod(math.ceil(n / c) for n, c in zip(shape, chunks, strict=True))
    _require(chunk_bytes == 2 * padded_chunk and nbytes == count * chunk_bytes, "its lengths do not fit its shape")
    return shape, chunks, blocks


def _lengths(values: Sequence[Any]) -> Shape:
    _require(len(values) == 3 and all(type(n) is int and 0 < n < 2**31 for n in values), f"lengths {values}")
    return values[0], values[1], values[2]


def _parse_trailer(trailer: bytes) -> dict[str, Any]:
    _, (_, names, contents), *_ = _unpack(trailer)
    if list(names) != [RECORD_NAME.encode()] or len(contents) != 1:
        raise InputError("no store of this project: build it with preprocess/build_store.py")
    packed = contents[0]
    nbytes, _, cbytes = struct.unpack("<iii", packed[4:16])
    _require(0 < nbytes <= MAX_RECORD_BYTES and cbytes == len(packed) >= _CHUNK_HEADER_BYTES, "record")
    text = _unpack(blosc2.decompress2(packed, nthreads=1))
    record = json.loads(text)
    _require(isinstance(record, dict), "record")
    return dict(record)
