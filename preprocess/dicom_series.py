"""A validated series -> HU volume on the standard axes; a tilted gantry resampled away where that was asked for.

Reference: the shear of a tilted gantry, PS3.3 C.8.2.1 (Gantry/Detector Tilt); same idea as dcm2niix' ``_Tilt`` files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from dataset.geometry import to_standard
from dataset.volume_io import AIR_HU, HU_FLOOR, MAX_VOXELS, Volume, holds_air, to_int16_hu
from errors import InputError
from preprocess.dicom_header import Slice
from preprocess.dicom_pixels import PixelCounts, read_stored, to_hu
from preprocess.dicom_stack import Stack, as_orthogonal, build_stack, without_localizers

# So many voxels of a chest are soft tissue, within this of water: a quarter at least of the real ones at hand. Where an
# intercept was applied twice, only the densest bone gets there.
_SOFT_TISSUE_HU, _LEAST_SOFT_TISSUE = 200, 0.01


@dataclass(frozen=True)
class Series:
    """A series that became a volume.

    Attributes:
        volume: standard axes, int16 HU, RAS+ affine.
        stack: its slices and their geometry, after a tilt was resampled.
        counts: what was changed on the way.
        tilt_resampled_deg: the tilt that was resampled away, or 0.
        localizers: scouts left out.
    """

    volume: Volume
    stack: Stack
    counts: PixelCounts
    tilt_resampled_deg: float
    localizers: int


def read_series(frames: Sequence[Slice], *, resample_tilt: bool = False, allow_partial: bool = False) -> Series:
    """Validate the frames of one series and read them.

    Args:
        frames: in any order, duplicates allowed.
        resample_tilt: move the slices of a tilted gantry back over each other instead of refusing them.
        allow_partial: take a series whose header says that its ends are missing.

    Returns:
        The volume: voxels as stored by the scanner, unless a tilt was resampled; padding at -1024 HU.

    Raises:
        InputError: the frames are no volume, or a file is damaged; says which and why.
    """
    kept, localizers = without_localizers(frames)
    stack = build_stack(kept, _same_pixels, allow_partial=allow_partial)
    if stack.is_tilted and not resample_tilt:
        raise InputError(
            f"{stack.slices[0].label}: the gantry was tilted by {stack.tilt_deg:.1f}°, slices are shifted by "
            f"{math.hypot(*stack.shift_mm):.2f} mm each: convert with --resample-tilt, or leave it out"
        )
    first = stack.slices[0].pixels
    if len(stack.slices) * first.rows * first.columns > MAX_VOXELS:
        raise InputError(f"{len(stack.slices)} slices of {first.rows}×{first.columns} are no CT volume: too large")
    hu = np.empty((len(stack.slices), first.rows, first.columns), dtype=np.int16)
    counts = PixelCounts()
    for index, frame in enumerate(stack.slices):
        to_hu(read_stored(frame), frame, hu[index], counts)
    _require_hu(hu, stack.slices[0].label)
    tilt_deg = 0.0
    if stack.is_tilted:
        tilt_deg = stack.tilt_deg
        hu, stack = _unshear(hu, stack)
    # (slice, row, column) is the file array (column, row, slice) transposed; no copy is made
    standard, affine = to_standard(hu.transpose(2, 1, 0), stack.affine)
    return Series(Volume(standard, affine), stack, counts, tilt_deg, localizers)


def _require_hu(hu: np.ndarray, label: str) -> None:
    """Refuse voxels without air, whose intercept was lost, or without soft tissue; a few slices mostly tell."""
    few = hu[:: max(1, len(hu) // 8)]
    if not holds_air(few) and not holds_air(hu):
        raise InputError(f"{label}: no voxel is below {AIR_HU} HU, there is no air: not in HU")
    if _soft_tissue(few) < _LEAST_SOFT_TISSUE and _soft_tissue(hu) < _LEAST_SOFT_TISSUE:
        raise InputError(
            f"{label}: less than {_LEAST_SOFT_TISSUE:.0%} of the voxels lie within {_SOFT_TISSUE_HU} HU of water: "
            "there is no soft tissue, the intercept may have been applied twice"
        )


def _soft_tissue(hu: np.ndarray) -> float:
    return float(np.count_nonzero((hu > -_SOFT_TISSUE_HU) & (hu < _SOFT_TISSUE_HU))) / hu.size


def _same_pixels(one: Slice, other: Slice) -> bool:
    return _digest(one) == _digest(other)


def _digest(frame: Slice) -> bytes:
    """Of the HU of a frame: its stored values may differ where the slope does."""
    hu = np.empty((frame.pixels.rows, frame.pixels.columns), np.int16)
    to_hu(read_stored(frame), frame, hu, PixelCounts())
    return hashlib.sha256(hu.tobytes()).digest()


def _unshear(hu: np.ndarray, stack: Stack) -> tuple[np.ndarray, Stack]:
    """Shift every slice in its plane so that the stack stands upright on its normal; nothing is cut off.

    Args:
        hu: (slice, row, column) int16.
        stack: its geometry; ``shift_mm`` is the drift per slice.

    Returns:
        int16 (slice, row, column) on a grid widened by the total drift, linear in plane, air outside; its geometry.
    """
    depth = len(hu)
    row_mm, column_mm = stack.slices[0].spacing_mm
    # the content of slice k lies k * shift further along the row and the column direction
    per_slice = np.array([stack.shift_mm[1] / row_mm, stack.shift_mm[0] / column_mm])  # (rows, columns)
    total = per_slice * (depth - 1)
    before = np.ceil(np.maximum(-total, 0)).astype(int)
    after = np.ceil(np.maximum(total, 0)).astype(int)
    size = np.array(hu.shape[1:]) + before + after
    if depth * int(size.prod()) > MAX_VOXELS:
        raise InputError(f"unshearing {stack.tilt_deg:.1f}° needs {depth}×{size[0]}×{size[1]} voxels: too large")
    result = np.full((depth, *size), HU_FLOOR, dtype=np.int16)
    for index in range(depth):
        padded = np.full(tuple(size), HU_FLOOR, dtype=np.float32)
        padded[before[0] : before[0] + hu.shape[1], before[1] : before[1] + hu.shape[2]] = hu[index]
        moved = ndimage.shift(padded, per_slice * index, order=1, mode="constant", cval=HU_FLOOR)
        result[index] = to_int16_hu(moved)[0]
    affine = stack.affine.copy()
    in_plane = affine[:3, :2] / np.array([column_mm, row_mm])
    affine[:3, 2] -= in_plane @ np.array(stack.shift_mm)  # what is left of the step is the normal
    affine[:3, 3] -= affine[:3, 0] * before[1] + affine[:3, 1] * before[0]
    return result, as_orthogonal(stack, affine)
