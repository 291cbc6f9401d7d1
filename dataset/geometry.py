"""Axes and affines: any of the 48 NIfTI orientations to the project's axes and back.

The standard array is (D, H, W): D inferior→superior, H anterior→posterior, W patient right→left, the order in which
DICOM stores axial slices (LPS+). The affine of a standard array maps its index (d, h, w, 1) to RAS+ millimetres, the
world of NIfTI, so W runs towards -x and H towards -y. Nothing else in the project flips or permutes a volume that is
written or generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from nibabel.orientations import io_orientation, ornt2axcodes
from scipy import ndimage

from errors import InputError
from params import HU_AIR

# world letter towards which an axis runs -> (axis of the standard array, runs the standard way)
_STANDARD_AXIS = {"S": (0, True), "I": (0, False), "P": (1, True), "A": (1, False), "L": (2, True), "R": (2, False)}
# A unit parallelepiped flatter than this has lost a dimension (a gantry tilt of 30° has 0.87).
_MIN_UNIT_VOLUME = 1e-3


@dataclass(frozen=True)
class Orientation:
    """How a file stores its axes, so that a result can be written on the input's own grid.

    Args:
        codes: for each array axis (i, j, k) the letter of R/L, A/P, S/I towards which it runs (nearest axis).
        file_affine: the file's affine, (4, 4) float64, where there was a file; lets a round trip be exact to the bit.
    """

    codes: tuple[str, str, str]
    file_affine: np.ndarray | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.codes) != 3 or {_STANDARD_AXIS.get(code, (-1,))[0] for code in self.codes} != {0, 1, 2}:
            raise InputError(f"axis codes {self.codes!r}: one each of R/L, A/P and S/I is needed")

    @classmethod
    def of(cls, file_affine: np.ndarray) -> Orientation:
        """The orientation of a NIfTI affine, (4, 4); an oblique one goes to its nearest axes."""
        file_affine = checked_affine(file_affine)
        codes = ornt2axcodes(io_orientation(file_affine))
        if None in codes:
            raise InputError(f"affine {file_affine.tolist()} has no nearest axes")
        return cls((codes[0], codes[1], codes[2]), file_affine)

    @property
    def permutation(self) -> tuple[int, int, int]:
        """File axis that becomes D, H and W."""
        order = [_STANDARD_AXIS[code][0] for code in self.codes]
        return order.index(0), order.index(1), order.index(2)

    @property
    def flipped(self) -> tuple[bool, bool, bool]:
        """Whether each file axis runs against the standard."""
        i, j, k = (not _STANDARD_AXIS[code][1] for code in self.codes)
        return i, j, k


# Storage of results that have no input grid: i right→left, j anterior→posterior, k inferior→superior.
LPS_STORAGE = Orientation(("L", "P", "S"))


def checked_affine(affine: np.ndarray) -> np.ndarray:
    """A copy of ``affine`` as (4, 4) float64.

    Raises:
        InputError: wrong shape, NaN or infinite numbers, a last row other than (0, 0, 0, 1), or singular.
    """
    affine = np.array(affine, dtype=np.float64)
    if affine.shape != (4, 4):
        raise InputError(f"the affine has shape {affine.shape}, (4, 4) is needed")
    if not np.isfinite(affine).all():
        raise InputError("the affine holds NaN or infinite numbers")
    if not np.array_equal(affine[3], (0.0, 0.0, 0.0, 1.0)):
        raise InputError(f"the last row of the affine is {affine[3].tolist()}, [0, 0, 0, 1] is needed")
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not (lengths > 0).all() or not np.isfinite(lengths).all():
        raise InputError("the affine is singular (an axis without length)")
    if abs(np.linalg.det(affine[:3, :3] / lengths)) < _MIN_UNIT_VOLUME:
        raise InputError("the affine is singular (its axes lie in one plane)")
    return affine


def to_standard(file_array: np.ndarray, file_affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bring a file's array to the standard axes.

    Args:
        file_array: (i, j, k), any dtype.
        file_affine: (4, 4), index (i, j, k, 1) -> RAS+ mm; oblique and sheared ones are kept as they are.

    Returns:
        A view (D, H, W) of the same voxels and its affine, float64: every voxel keeps its place in the world.

    Raises:
        InputError: the array is not 3D or the affine is not usable.
    """
    orientation = Orientation.of(file_affine)
    _require_3d(file_array)
    assert orientation.file_affine is not None
    affine = _flip_affine(orientation.file_affine, file_array.shape, orientation.flipped)
    columns = [*orientation.permutation, 3]
    return _flip(file_array, orientation.flipped).transpose(orientation.permutation), affine[:, columns]


def from_standard(
    array_dhw: np.ndarray, affine_dhw: np.ndarray, like: Orientation = LPS_STORAGE
) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `to_standard`: (D, H, W) and its affine -> a view (i, j, k) stored like ``like``, and its affine.

    If the array still lies on the grid of the file that ``like`` came from, that file's affine is returned bit by bit.

    Raises:
        InputError: the array is not 3D or the affine is not usable.
    """
    affine_dhw = checked_affine(affine_dhw)
    _require_3d(array_dhw)
    inverse = tuple(int(axis) for axis in np.argsort(like.permutation))
    file_array = _flip(array_dhw.transpose(inverse), like.flipped)
    if like.file_affine is not None:
        unchanged = _flip_affine(like.file_affine, file_array.shape, like.flipped)[:, [*like.permutation, 3]]
        if np.array_equal(unchanged, affine_dhw):
            return file_array, like.file_affine.copy()
    return file_array, _flip_affine(affine_dhw[:, [*inverse, 3]], file_array.shape, like.flipped)


def spacing_mm(affine: np.ndarray) -> tuple[float, float, float]:
    """Distance in mm between neighbours along each array axis; (d, h, w) for a standard affine (4, 4)."""
    d, h, w = np.linalg.norm(np.asarray(affine, dtype=np.float64)[:3, :3], axis=0)
    return float(d), float(h), float(w)


def affine_after_crop(affine: np.ndarray, start_vox: Sequence[float]) -> np.ndarray:
    """The affine of an array that begins at index ``start_vox`` of the old one (negative: padded in front)."""
    moved = checked_affine(affine)
    moved[:3, 3] += moved[:3, :3] @ np.asarray(start_vox, dtype=np.float64)
    return moved


def crop_or_pad(
    array: np.ndarray,
    affine: np.ndarray,
    size_dhw: Sequence[int],
    start_dhw: Sequence[int] | None = None,
    fill: float = HU_AIR,
) -> tuple[np.ndarray, np.ndarray]:
    """Cut or pad (D, H, W) to ``size_dhw`` voxels; no voxel moves in the world.

    Args:
        array: (D, H, W), any dtype.
        affine: (4, 4) of ``array``.
        size_dhw: the new size.
        start_dhw: index of the old array at which the new one begins, negative to pad in front; default centred
            (of an odd difference the larger half is at the end).
        fill: value of padded voxels, in the array's unit; air in HU by default.

    Returns:
        A new array of ``size_dhw`` and its affine.

    Raises:
        InputError: the array is not 3D, the size is not positive or the affine is not usable.
    """
    _require_3d(array)
    size = _checked_size(size_dhw)
    if start_dhw is None:
        start_dhw = [int((have - want) / 2) for have, want in zip(array.shape, size, strict=True)]
    result = np.full(size, fill, dtype=array.dtype)
    source, destination = [], []
    for have, want, start in zip(array.shape, size, start_dhw, strict=True):
        low, high = max(start, 0), min(start + want, have)
        source.append(slice(low, max(high, low)))
        destination.append(slice(low - start, max(high, low) - start))
    result[tuple(destination)] = array[tuple(source)]
    return result, affine_after_crop(affine, start_dhw)


def resample_to_size(array: np.ndarray, affine: np.ndarray, size_dhw: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Resample the whole field of view to ``size_dhw`` voxels; nothing is cropped, voxel edges stay aligned.

    Per axis with factor f = old/new: a Gaussian of sigma max(0, (f - 1) / 2) voxels against aliasing (the rule of
    skimage.transform.resize), then linear interpolation at old index (o + 1/2) f - 1/2, edges repeated. Both are
    separable and linear, so each axis is filtered and sampled before the next: the largest shrink first, since it
    makes the rest cheap.

    Args:
        array: (D, H, W), any real dtype.
        affine: (4, 4) of ``array``.
        size_dhw: the new size.

    Returns:
        float32 array of ``size_dhw`` in the unit of ``array``, and its affine.

    Raises:
        InputError: the array is not 3D, a size is not positive or the affine is not usable.
    """
    _require_3d(array)
    size = _checked_size(size_dhw)
    factors = [have / want for have, want in zip(array.shape, size, strict=True)]
    result = array
    for axis in sorted(range(3), key=lambda axis: -factors[axis]):
        factor = factors[axis]
        if array.shape[axis] == size[axis]:
            continue
        if factor > 1:
            sigma_vox = (factor - 1) / 2
            result = ndimage.gaussian_filter1d(result, sigma_vox, axis=axis, output=np.float32, mode="nearest")
        result = _sample_linear(result, axis, size[axis], factor)
    return np.ascontiguousarray(result, dtype=np.float32), resampled_affine(affine, array.shape, size)


def resampled_affine(affine: np.ndarray, old_size: Sequence[int], new_size: Sequence[int]) -> np.ndarray:
    """The affine (4, 4) after `resample_to_size`: the same field of view, voxel edge to voxel edge."""
    scaled = checked_affine(affine)
    factors = np.asarray(old_size, dtype=np.float64) / np.asarray(new_size, dtype=np.float64)
    scaled[:3, 3] += scaled[:3, :3] @ ((factors - 1) / 2)
    scaled[:3, :3] *= factors
    return scaled


def _sample_linear(array: np.ndarray, axis: int, count: int, factor: float) -> np.ndarray:
    last = array.shape[axis] - 1
    position = np.clip((np.arange(count) + 0.5) * factor - 0.5, 0, last)
    below = np.minimum(position.astype(np.intp), max(last - 1, 0))
    weight = (position - below).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
    low = np.take(array, below, axis=axis).astype(np.float32, copy=False)
    high = np.take(array, np.minimum(below + 1, last), axis=axis).astype(np.float32, copy=False)
    # low + weight (high - low) keeps a constant exactly constant
    high = high - low
    high *= weight
    high += low
    return high


def _flip(array: np.ndarray, flipped: Sequence[bool]) -> np.ndarray:
    return array[tuple(slice(None, None, -1 if flip else None) for flip in flipped)]


def _flip_affine(affine: np.ndarray, shape: Sequence[int], flipped: Sequence[bool]) -> np.ndarray:
    affine = affine.copy()
    for axis, (length, flip) in enumerate(zip(shape, flipped, strict=True)):
        if flip:
            affine[:3, 3] += affine[:3, axis] * (length - 1)
            affine[:3, axis] = -affine[:3, axis]
    return affine + 0.0  # no negative zeros, which print as a difference where there is none


def _require_3d(array: np.ndarray) -> None:
    if array.ndim != 3 or 0 in array.shape:
        raise InputError(f"the volume has shape {tuple(array.shape)}, three non-empty axes are needed")


def _checked_size(size_dhw: Sequence[int]) -> tuple[int, int, int]:
    size = tuple(int(length) for length in size_dhw)
    if len(size) != 3 or min(size) < 1:
        raise InputError(f"size [D, H, W] = {list(size_dhw)}: three positive numbers are needed")
    return size[0], size[1], size[2]
