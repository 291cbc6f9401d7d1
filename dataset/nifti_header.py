"""NIfTI headers: parsed with every claim checked, and built without surprises.

Reference: NIfTI-1.1 and NIfTI-2 headers, https://nifti.nimh.nih.gov; DEFLATE, RFC 1951.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO, Literal

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from dataset.geometry import checked_affine, spacing_mm
from errors import InputError, one_line

# Micro-CT begins below, and no CT has slices further apart: beyond it the unit is wrong (mm that say they are metres).
MIN_SPACING_MM, MAX_SPACING_MM = 0.05, 50.0
# DEFLATE cannot expand further (258 bytes from 2 bits); a header that claims more lies.
_MAX_GZIP_RATIO = 1032
# A volume that is both this large and this compressible is a bomb: real CT shrinks 2- to 10-fold.
_BOMB_BYTES, _BOMB_RATIO = 2**29, 500
_MAX_AXIS_VOX = 32767
_DATA_TYPES = {f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)} | {"float32", "float64"}
_MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # NIfTI xyzt_units: unknown (taken as mm), m, mm, µm
# The two affines of a file may differ by so much in voxel sizes and directions; more is another geometry.
_SAME_SIZE, _SAME_DIRECTION_DEG = 0.01, 1.0
_SAME_PLACE_VOX = 1.0  # at the corners of the volume
_NIFTI1, _NIFTI2 = 348, 540  # size of the header, which is also its first number
_ORDER: dict[str, Literal["little", "big"]] = {"<": "little", ">": "big"}


@dataclass(frozen=True)
class NiftiHeader:
    """What the project needs of a header: all of it checked, nothing of it clamped."""

    shape: tuple[int, int, int]  # (i, j, k)
    affine: np.ndarray
    dtype: np.dtype
    slope: float
    intercept: float
    offset: int  # of the first voxel, in bytes from the start
    consumed: int  # bytes of the stream read for the header

    @property
    def end(self) -> int:
        """Bytes of the uncompressed stream up to the last voxel."""
        return self.offset + int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize


def parse_header(stream: BinaryIO, max_voxels: int) -> NiftiHeader:
    """Read the header of a single-file NIfTI from the start of ``stream``.

    Raises:
        InputError: not NIfTI, not one 3D volume of real numbers, more than ``max_voxels``, or no usable geometry.
    """
    block = stream.read(_NIFTI1)
    endianness = next((e for e in "<>" if int.from_bytes(block[:4], _ORDER[e]) in (_NIFTI1, _NIFTI2)), None)
    if endianness is None or len(block) < _NIFTI1:
        raise InputError("not a NIfTI file: give a .nii or .nii.gz")
    is_second = int.from_bytes(block[:4], _ORDER[endianness]) == _NIFTI2
    if is_second:
        block += stream.read(_NIFTI2 - _NIFTI1)
    magic = block[4:7] if is_second else block[344:347]
    if magic in (b"ni1", b"ni2"):
        raise InputError("a NIfTI pair (.hdr and .img): convert it to one .nii.gz")
    if magic != (b"n+2" if is_second else b"n+1") or len(block) < (_NIFTI2 if is_second else _NIFTI1):
        raise InputError("not a NIfTI file (its magic number is missing): give a .nii or .nii.gz")
    header = (Nifti2Header if is_second else Nifti1Header)(block, endianness, check=False)

    count = int(header["dim"][0])
    sizes = [int(size) for size in header["dim"][1 : 1 + count]] if 1 <= count <= 7 else []
    if len(sizes) < 3 or any(size != 1 for size in sizes[3:]):
        raise InputError(f"{count}-dimensional with sizes {sizes}: one 3D volume is needed")
    shape = (sizes[0], sizes[1], sizes[2])
    if min(shape) < 1:
        raise InputError(f"the header claims size {list(shape)}: the file is damaged")
    voxels = shape[0] * shape[1] * shape[2]
    if voxels > max_voxels:
        raise InputError(f"the header claims {voxels} voxels, at most {max_voxels} are read: it is damaged or no CT")
    try:
        dtype = header.get_data_dtype()
    except (KeyError, HeaderDataError) as error:
        raise InputError(f"unknown data type {int(header['datatype'])}: the file is damaged") from error
    if dtype.name not in _DATA_TYPES:
        raise InputError(f"data type {dtype.name} is not a CT's: convert it to int16")

    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if not np.isfinite([slope, intercept]).all():
        raise InputError(f"slope {slope} and intercept {intercept} give no HU: the file is damaged, convert it again")
    if slope == 0:  # NIfTI: "if the scl_slope field is nonzero", else the voxels are as stored
        slope, intercept = 1.0, 0.0
    first = len(block) + 4
    offset = float(header["vox_offset"])
    if not np.isfinite(offset) or offset != int(offset) or (offset != 0 and offset < first - 4):
        raise InputError(f"voxel offset {offset}: the file is damaged")
    return NiftiHeader(shape, _affine(header, shape), dtype, slope, intercept, int(offset) or first, len(block))


def _affine(header: Nifti1Header, shape: tuple[int, int, int]) -> np.ndarray:
    try:
        sform, qform = header.get_sform(coded=True)[0], header.get_qform(coded=True)[0]
    except (HeaderDataError, WrapStructError, ValueError) as error:
        raise InputError(f"the qform is damaged ({one_line(error)}): convert it again") from error
    affine = qform if sform is None else sform
    if affine is None:
        raise InputError("neither sform nor qform is set, so left and right are unknown: convert it again with one")
    affine = checked_affine(affine)
    if sform is not None and qform is not None:
        _require_agreement(affine, checked_affine(qform), shape)
    affine[:3] *= _MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)
    spacing = spacing_mm(affine)
    if min(spacing) < MIN_SPACING_MM or max(spacing) > MAX_SPACING_MM:
        raise InputError(
            f"voxel spacing {[float(f'{mm:.4g}') for mm in spacing]} mm is no CT's: check the affine and its unit"
        )
    return affine


def _require_agreement(sform: np.ndarray, qform: np.ndarray, shape: tuple[int, int, int]) -> None:
    """Refuse two affines that say different things: readers differ in which one they take."""
    ours, theirs = np.array(spacing_mm(sform)), np.array(spacing_mm(qform))
    cosines = np.sum(sform[:3, :3] / ours * (qform[:3, :3] / theirs), axis=0)
    turned_deg = float(np.degrees(np.arccos(np.clip(cosines, -1, 1))).max())
    if np.abs(theirs / ours - 1).max() > _SAME_SIZE or turned_deg > _SAME_DIRECTION_DEG:
        sizes = [[float(f"{mm:.4g}") for mm in each] for each in (ours, theirs)]
        raise InputError(
            f"sform and qform disagree (voxels of {sizes[0]} and {sizes[1]}, axes turned by {turned_deg:.0f}°): "
            "convert it again, or set the code of the wrong one to 0"
        )
    corners = np.array([[*corner, 1] for corner in np.ndindex(2, 2, 2)]).T * [[size - 1] for size in (*shape, 2)]
    apart = ((qform - sform) @ corners)[:3]
    off_vox = float(np.abs(np.linalg.solve(sform[:3, :3], apart)).max())
    if off_vox > _SAME_PLACE_VOX:
        raise InputError(
            f"sform and qform disagree (corners up to {off_vox:.1f} voxels apart): convert it again, or set the code "
            "of the wrong one to 0"
        )


def check_claim(header: NiftiHeader, stored_bytes: int, is_gzip: bool) -> None:
    """Refuse sizes that the file cannot hold, before anything is allocated."""
    size = f"{list(header.shape)} {header.dtype.name} ({header.end} bytes)"
    if not is_gzip:
        if header.end > stored_bytes:
            raise InputError(f"truncated, the header claims {size}, the file has {stored_bytes}: copy it again")
        return
    if header.end > _MAX_GZIP_RATIO * stored_bytes:
        raise InputError(f"the header claims {size}, {stored_bytes} compressed bytes cannot hold that: copy it again")
    if header.end > _BOMB_BYTES and header.end > _BOMB_RATIO * stored_bytes:
        raise InputError(f"{size} from {stored_bytes} compressed bytes looks like a gzip bomb: not read")


def new_header(shape: tuple[int, ...], affine: np.ndarray) -> Nifti1Header:
    """A NIfTI-1 header for int16 voxels (i, j, k): slope 1, intercept 0, mm, sform and qform code 1.

    A sheared affine, which a qform cannot hold, gets qform code 0.

    Raises:
        InputError: an axis is too long for NIfTI-1.
    """
    if max(shape) > _MAX_AXIS_VOX:
        raise InputError(f"size {list(shape)}: NIfTI-1 holds at most {_MAX_AXIS_VOX} voxels along an axis")
    header = Nifti1Header(endianness="<")
    header.set_data_shape(shape)
    header.set_data_dtype(np.int16)
    header.set_slope_inter(1.0, 0.0)
    header.set_xyzt_units("mm", "sec")
    header["vox_offset"] = header.single_vox_offset
    header.set_sform(affine, code=1)
    header.set_qform(affine, code=1, strip_shears=True)
    corner_mm = np.abs(header.get_qform() - affine)[:3] @ [*shape, 1]
    if corner_mm.max() > 1e-2 * min(spacing_mm(affine)):
        header.set_qform(None, code=0)
        header["pixdim"][1:4] = spacing_mm(affine)
    return header
