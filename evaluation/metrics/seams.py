"""Whether a volume that was put together from tiles shows where they meet."""

from __future__ import annotations

import math

import numpy as np

from dataset.tiling import HaloTiling, Tiling
from errors import InputError

_REFERENCE_VOX = 16  # how far "inside" is at most; beyond, other anatomy would be compared


def seam_ratio(reconstruction: np.ndarray, original: np.ndarray, tiling: Tiling | HaloTiling) -> float:
    """Error at the faces of tiles over the error inside tiles: 1 where nothing shows.

    The mean absolute error of the two planes that touch a face, summed over all faces inside the volume, over the same
    of planes 16 voxels (or a quarter of a tile, if that is less) to either side. They lie at whole strides from the
    face, so that they have the same places in the codec's cells (the error depends on those), and near it, so that they
    show the same anatomy. Any volume can be measured at the faces of any tiling: that of whole-volume inference is the
    ratio that the anatomy alone makes.

    Args:
        reconstruction: (D, H, W), any real dtype and unit.
        original: the same shape and unit.
        tiling: how the volume was cut.

    Returns:
        The ratio; 1 where no tile ends inside the volume or nothing differs, infinite if all error is at faces.

    Raises:
        InputError: the shapes differ or are not the tiling's.
    """
    if reconstruction.shape != original.shape or tuple(original.shape) != tuple(tiling.shape_dhw):
        raise InputError(
            f"seams: reconstruction {list(reconstruction.shape)}, original {list(original.shape)} and tiling "
            f"{list(tiling.shape_dhw)}: one shape [D, H, W] is needed"
        )
    at_faces = inside = 0.0
    for axis, borders in enumerate(tiling.borders):
        length, stride = tiling.shape_dhw[axis], tiling.stride_dhw[axis]
        distance = max(1, min(_REFERENCE_VOX, tiling.tile_dhw[axis] // 4) // stride) * stride
        for border in borders:
            references = [
                error
                for place in (border - distance, border + distance)
                if 1 <= place < length and min(abs(place - other) for other in borders) >= min(distance, 2 * stride)
                for error in [_error_at(reconstruction, original, axis, place)]
            ]
            if references:
                at_faces += _error_at(reconstruction, original, axis, border)
                inside += sum(references) / len(references)
    if inside == 0:
        return 1.0 if at_faces == 0 else math.inf
    return at_faces / inside


def _error_at(a: np.ndarray, b: np.ndarray, axis: int, border: int) -> float:
    """Sum of absolute errors of the planes before and behind a face."""
    planes: tuple[slice, ...] = (*(slice(None),) * axis, slice(border - 1, border + 1))
    difference = np.asarray(a[planes], np.float32) - np.asarray(b[planes], np.float32)
    return float(np.abs(difference, out=difference).sum(dtype=np.float64))
