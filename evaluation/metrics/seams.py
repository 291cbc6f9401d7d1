"""Whether a volume that was put together from tiles shows where they meet.

The error of every plane along every axis is all that takes: slices can come one after the other (`PlaneErrors`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dataset.tiling import HaloTiling, Tiling
from errors import InputError

_REFERENCE_VOX = 16  # how far "inside" is at most; beyond, other anatomy would be compared


class PlaneErrors:
    """Absolute errors of a volume, summed over each of its planes, from slices that come in any order.

    Args:
        shape_dhw: of the volume.
    """

    def __init__(self, shape_dhw: Sequence[int]) -> None:
        self.shape_dhw = tuple(shape_dhw)
        self._sums = tuple(np.zeros(length) for length in shape_dhw)

    def update(self, reconstruction: np.ndarray, original: np.ndarray, first_slice: int = 0) -> None:
        """Add slices (d, H, W) of any real dtype and one unit, of which ``first_slice`` is the first."""
        for index, (a, b) in enumerate(zip(reconstruction, original, strict=True), first_slice):
            error = np.subtract(a, b, dtype=np.float32)
            np.abs(error, out=error)
            rows = error.sum(axis=1, dtype=np.float64)
            self._sums[0][index] += rows.sum()
            self._sums[1][:] += rows
            self._sums[2][:] += error.sum(axis=0, dtype=np.float64)

    def at(self, axis: int, border: int) -> float:
        """Of the planes before and behind a face."""
        return float(self._sums[axis][border - 1 : border + 1].sum())

    def seam_ratio(self, tiling: Tiling | HaloTiling) -> float:
        """As the function `seam_ratio`, once all slices were added."""
        at_faces = inside = 0.0
        for axis, borders in enumerate(tiling.borders):
            length, stride = tiling.shape_dhw[axis], tiling.stride_dhw[axis]
            distance = max(1, min(_REFERENCE_VOX, tiling.tile_dhw[axis] // 4) // stride) * stride
            for border in borders:
                references = [
                    self.at(axis, place)
                    for place in (border - distance, border + distance)
                    if 1 <= place < length and min(abs(place - other) for other in borders) >= min(distance, 2 * stride)
                ]
                if references:
                    at_faces += self.at(axis, border)
                    inside += sum(references) / len(references)
        if inside == 0:
            return 1.0 if at_faces == 0 else math.inf
        return at_faces / inside


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
    errors = PlaneErrors(original.shape)
    errors.update(reconstruction, original)
    return errors.seam_ratio(tiling)
