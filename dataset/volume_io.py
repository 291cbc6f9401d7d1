"""NIfTI volumes in Hounsfield units: read with every claim of the header checked, written exactly and atomically.

The voxels never pass through a library's scaling: slope and intercept are applied once, in float64, chunk by chunk, so
memory stays at the int16 result plus some MB whatever a file claims. (nibabel loads a wrong CRC, a singular sform and
NaN slopes, and its own int16 autoscale turned 1.5 HU into 1.602.)

Reference: NIfTI, https://nifti.nimh.nih.gov; gzip, RFC 1952.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dataset.atomic import atomic_write
from dataset.geometry import LPS_STORAGE, Orientation, from_standard, spacing_mm, to_standard
from dataset.nifti_header import NiftiHeader, check_claim, new_header, parse_header
from errors import InputError, MemoryExhaustedError, ProjectError, one_line

# 1024³ voxels, 2 GiB as int16: six times 512×512×604.
MAX_VOXELS = 2**30
# A CT volume holds air: one without a voxel below this was scaled or shifted, or is a crop of tissue.
AIR_HU = -300
# The lowest HU of a 12-bit scanner: what lies below it is padding, no measurement.
HU_FLOOR = -1024
NO_GEOMETRY = "its affine is the identity, as converters write that lost spacing and orientation: check its source"
_INT16 = np.iinfo(np.int16)
_CHUNK_VOXELS = 1 << 20
# Writers may pad the end of a file; more than this is data that the header does not account for.
_MAX_TRAILING_BYTES = 4096
_GZIP_LEVEL = 1  # on CT: three times as fast as level 6, for a file 3 % larger


@dataclass(frozen=True)
class Volume:
    """A CT volume on the standard axes.

    Args:
        hu: int16 (D, H, W) in HU. `write_nifti` also takes floats and counts what rounding changes.
        affine: float64 (4, 4), index (d, h, w, 1) -> RAS+ mm.
        source: the file it came from, if any.
        orientation: how to store it; that of the file it came from, or LPS.
        clipped: voxels of the file beyond int16, clipped on reading.
        rounded: voxels of the file that were no whole HU, rounded on reading.
    """

    hu: np.ndarray
    affine: np.ndarray
    source: str | None = None
    orientation: Orientation = LPS_STORAGE
    clipped: int = 0
    rounded: int = 0

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel spacing (d, h, w) in mm."""
        return spacing_mm(self.affine)


@dataclass(frozen=True)
class VolumeHeader:
    """What a header says of a volume on the standard axes: shape (D, H, W), spacing (d, h, w) in mm, affine (4, 4)."""

    shape_dhw: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    affine: np.ndarray


@dataclass(frozen=True)
class WriteReport:
    """Voxels that changed when a volume became int16: by rounding, and by clipping to [-32768, 32767]."""

    rounded: int = 0
    clipped: int = 0


def read_nifti(path: str | os.PathLike[str], *, max_voxels: int = MAX_VOXELS) -> Volume:
    """Read a single-file NIfTI-1 or -2, gzipped or not, of any of the 48 orientations.

    Slope and intercept are applied exactly once; results are rounded half to even and clipped to int16. Whether they
    are HU is not asked here (`holds_air`). The affine is the sform's, else the qform's. A 4D file is taken when its
    further axes have length 1.

    Args:
        path: .nii or .nii.gz; recognised by content, not by name.
        max_voxels: larger volumes are refused.

    Raises:
        InputError: missing, not NIfTI, truncated, damaged (CRC), a header that does not fit the data, no usable
            orientation, NaN voxels; the message names the path. Memory stays bounded by what the file really holds.
        MemoryExhaustedError: the volume is sound but does not fit into memory.
    """
    path = Path(path)
    with _readable(path) as (stream, stored_bytes, is_gzip):
        header = parse_header(stream, max_voxels)
        check_claim(header, stored_bytes, is_gzip)
        voxels, changed = _read_voxels(stream, header)
    hu, affine = to_standard(voxels, header.affine)
    return Volume(hu, affine, str(path), Orientation.of(header.affine), changed.clipped, changed.rounded)


def read_header(path: str | os.PathLike[str], *, max_voxels: int = MAX_VOXELS) -> VolumeHeader:
    """Shape and spacing of a NIfTI file on the standard axes, without reading its voxels.

    Raises:
        InputError: as `read_nifti`, as far as the header shows it.
    """
    with _readable(Path(path)) as (stream, stored_bytes, is_gzip):
        header = parse_header(stream, max_voxels)
        check_claim(header, stored_bytes, is_gzip)
    empty = np.broadcast_to(np.zeros((), np.int8), header.shape)
    standard, affine = to_standard(empty, header.affine)
    depth, height, width = standard.shape
    return VolumeHeader((depth, height, width), spacing_mm(affine), affine)


def write_nifti(path: str | os.PathLike[str], volume: Volume) -> WriteReport:
    """Write ``volume`` as int16 NIfTI-1 (slope 1, intercept 0), stored as ``volume.orientation`` says; atomically.

    Sform and qform both carry the affine with code 1 (scanner); a sheared affine, which a qform cannot hold, gets
    qform code 0. NIfTI-1 keeps affines in float32.

    Args:
        path: .nii, or .nii.gz to compress; the same volume gives the same bytes.
        volume: ``hu`` int16, or any real dtype: rounded half to even and clipped, both counted.

    Raises:
        InputError: the volume is not 3D, holds NaN, or its affine is not usable.
        StorageError: the disk refuses; an earlier file of that name is untouched.
    """
    path = Path(path)
    rounded = clipped = 0
    try:
        if volume.hu.dtype.kind not in "iuf":
            raise InputError(f"dtype {volume.hu.dtype} is not a HU volume")
        file_array, file_affine = from_standard(volume.hu, volume.affine, volume.orientation)
        header = new_header(file_array.shape, file_affine)
        with atomic_write(path) as target, contextlib.ExitStack() as stack:
            sink: BinaryIO = target
            if path.suffix.lower() == ".gz":
                # no file name and no time in the gzip header: the same volume, the same bytes
                compressor = gzip.GzipFile(filename="", mode="wb", fileobj=target, compresslevel=_GZIP_LEVEL, mtime=0)
                sink = stack.enter_context(compressor)  # type: ignore[assignment]
            sink.write(header.binaryblock + b"\0\0\0\0")  # four zero bytes: no extensions
            for plane in file_array.transpose(2, 1, 0):  # the first file axis runs fastest
                plane_hu, plane_rounded, plane_clipped = to_int16_hu(plane)
                rounded, clipped = rounded + plane_rounded, clipped + plane_clipped
                sink.write(np.ascontiguousarray(plane_hu, dtype="<i2").tobytes())
    except InputError as error:
        raise InputError(one_line(f"{path}: not written, {error}")) from error
    return WriteReport(rounded, clipped)


def holds_air(hu: np.ndarray) -> bool:
    """Whether a volume in HU, any shape, has a voxel below `AIR_HU`, as every chest has."""
    return int(hu.min()) < AIR_HU


def without_geometry(affine: np.ndarray, shape_dhw: tuple[int, ...]) -> bool:
    """Whether a volume's file had the identity as its affine: the mark of a converter that lost the geometry.

    Args:
        affine: of the volume on the standard axes, in which the identity runs back along (h, w).
        shape_dhw: of the volume.
    """
    _, height, width = shape_dhw
    return bool(np.array_equal(affine, [[0, 0, -1, width - 1], [0, -1, 0, height - 1], [1, 0, 0, 0], [0, 0, 0, 1]]))


def floored(hu: np.ndarray) -> tuple[np.ndarray, int]:
    """HU, any shape -> (the same with padding at `HU_FLOOR`, how many voxels that changed).

    To be asked before resampling: padding of -3024 HU would darken the tissue beside it.
    """
    if int(hu.min()) >= HU_FLOOR:  # the common case, without a copy
        return hu, 0
    return np.maximum(hu, hu.dtype.type(HU_FLOOR)), int(np.count_nonzero(hu < HU_FLOOR))


def to_int16_hu(values_hu: np.ndarray) -> tuple[np.ndarray, int, int]:
    """HU of any real dtype -> (int16 HU, voxels changed by rounding, voxels clipped); round half to even.

    Raises:
        InputError: NaN or infinite values.
    """
    if values_hu.dtype == np.int16:
        return values_hu, 0, 0
    if values_hu.dtype not in (np.float32, np.float64):
        # np.clip refuses -32768 for unsigned integers, and float16 has no 32767
        values_hu = values_hu.astype(np.float64)
    if not np.isfinite(values_hu).all():
        raise InputError("NaN or infinite voxels: HU must be finite, convert it again")
    whole = np.rint(values_hu)
    rounded = int(np.count_nonzero(whole != values_hu))
    clipped = int(np.count_nonzero((whole < _INT16.min) | (whole > _INT16.max)))
    return np.clip(whole, _INT16.min, _INT16.max).astype(np.int16), rounded, clipped


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[tuple[BinaryIO, int, bool]]:
    """Yield (uncompressed stream, bytes on disk, is gzip); whatever goes wrong inside becomes one line on ``path``."""
    try:
        # a pipe would block on opening, a device may be endless
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError("not a file: give one .nii or .nii.gz")
        with contextlib.ExitStack() as stack:
            raw = stack.enter_context(open(path, "rb"))
            stored_bytes = os.fstat(raw.fileno()).st_size
            if stored_bytes == 0:
                raise InputError("the file is empty: copy or convert it again")
            is_gzip = raw.peek(2)[:2] == b"\x1f\x8b"
            stream: BinaryIO = raw
            if is_gzip:
                stream = stack.enter_context(gzip.GzipFile(fileobj=raw))  # type: ignore[assignment]
            yield stream, stored_bytes, is_gzip
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: damaged gzip data ({one_line(error)}): copy or convert it again") from error
    except EOFError as error:
        raise InputError(f"{path}: truncated, the compressed data ends too early: copy or convert it again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or one_line(error)})") from error
    except MemoryError as error:
        raise MemoryExhaustedError(
            f"{path}: does not fit into memory ({one_line(error)}): use a larger machine"
        ) from error
    except ProjectError as error:
        raise type(error)(one_line(f"{path}: {error}")) from error


def _read_voxels(stream: BinaryIO, header: NiftiHeader) -> tuple[np.ndarray, WriteReport]:
    """The voxels as int16 (i, j, k), Fortran order as in the file, and how many were rounded and clipped."""
    _skip(stream, header.offset - header.consumed)
    count = header.shape[0] * header.shape[1] * header.shape[2]
    # np.empty touches no page: memory grows with what the stream really delivers
    voxels = np.empty(count, dtype=np.int16)
    scaled = header.slope != 1 or header.intercept != 0
    rounded = clipped = 0
    for begin in range(0, count, _CHUNK_VOXELS):
        end = min(begin + _CHUNK_VOXELS, count)
        wanted = (end - begin) * header.dtype.itemsize
        data = stream.read(wanted)
        if len(data) != wanted:
            raise EOFError
        chunk = np.frombuffer(data, dtype=header.dtype)
        if scaled:
            with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused as not finite
                chunk = chunk.astype(np.float64) * header.slope + header.intercept
        voxels[begin:end], chunk_rounded, chunk_clipped = to_int16_hu(chunk)
        rounded, clipped = rounded + chunk_rounded, clipped + chunk_clipped
    # the CRC and length of a gzip member are verified only by reading on to its end
    trailing = len(stream.read(_MAX_TRAILING_BYTES + 1))
    if trailing > _MAX_TRAILING_BYTES:
        raise InputError(f"holds more data than its header claims ({list(header.shape)}): the file is damaged")
    return voxels.reshape(header.shape, order="F"), WriteReport(rounded, clipped)


def _skip(stream: BinaryIO, count: int) -> None:
    while count > 0:
        got = len(stream.read(min(count, _CHUNK_VOXELS)))
        if got == 0:
            raise EOFError
        count -= got
