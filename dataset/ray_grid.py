"""Where each cell of a latent grid is seen in a standard radiograph: the geometry of lifting.

A pixel of a radiograph is a ray, so the features of that pixel belong to every cell on the ray. The grid that is made
here turns this round: it names for every cell the place in the picture, and `grid_sample` does the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from dataset.geometry import resampled_affine, spacing_mm
from dataset.projection import SOURCE_DETECTOR_MM, SOURCE_ISOCENTRE_MM, ConeGeometry, View, voxel_to_world
from dataset.xray import XRay
from dataset.xray_drr import DRRInfo, read_info
from errors import ConfigurationError

log = logging.getLogger(__name__)

_RENDERED = "rendered from CT"  # note of `dataset.xray.load_xray` on a picture with its geometry
# Cells that lie far outside, or behind the source, are brought to this distance from the middle of the picture: finite,
# outside, and near enough that the mean of a block of cells stays meaningful.
_FAR = 3.0
# How much larger than life the middle of the chest is on the detector of a chest stand.
_MAGNIFICATION = SOURCE_DETECTOR_MM / SOURCE_ISOCENTRE_MM
# Longer side of a chest radiograph on the detector. Standard cassettes run from 18×24 to 35×43 cm; beyond these bounds
# a spacing is a converter's default or a thumbnail's.
_PICTURE_MM = (150.0, 600.0)


def latent_affine(affine: np.ndarray, stride_dhw: Sequence[int]) -> np.ndarray:
    """The affine (4, 4) of the latent grid of a volume: a cell is the block of ``stride_dhw`` voxels."""
    return resampled_affine(affine, stride_dhw, (1, 1, 1))


def latent_shape(shape_dhw: Sequence[int], stride_dhw: Sequence[int]) -> tuple[int, int, int]:
    """Cells (d, h, w) of a volume that is padded to a multiple of the stride at its far ends."""
    d, h, w = (-(-size // step) for size, step in zip(shape_dhw, stride_dhw, strict=True))
    return d, h, w


def rendered_info(xray: XRay) -> DRRInfo | None:
    """The geometry of a picture that was rendered from a CT; None for a real radiograph.

    A geometry beside a DICOM or JPEG file belongs to the picture of the same name, not to that file.

    Raises:
        InputError: it is damaged since the picture was loaded.
    """
    return read_info(Path(xray.source)) if _RENDERED in xray.notes else None


def believed_spacing_mm(xray: XRay) -> tuple[float, float] | None:
    """The pixel spacing (row, column) on the detector that decides the scale of a real radiograph.

    None where the file tells none, or one that makes the picture larger or smaller than any chest radiograph; the
    latter is logged, once for each file.
    """
    if xray.pixel_spacing_mm is None:
        return None
    # half a pixel is not known where the padding is odd
    sides = (xray.image.shape[-1] - 2 * pad for pad in xray.placement.pad)
    tall_mm, wide_mm = (side * step for side, step in zip(sides, xray.pixel_spacing_mm, strict=True))
    if _PICTURE_MM[0] <= max(tall_mm, wide_mm) <= _PICTURE_MM[1]:
        return xray.pixel_spacing_mm
    _tell_unbelieved(xray.source, round(tall_mm), round(wide_mm))
    return None


@cache
def _tell_unbelieved(source: str, tall_mm: int, wide_mm: int) -> None:
    log.warning("%s: its pixel spacing makes it %d×%d mm, no chest radiograph: it is ignored", source, tall_mm, wide_mm)


def ray_grid(
    geometry: ConeGeometry | None,
    view: View,
    xray: XRay,
    affine: np.ndarray,
    shape_dhw: Sequence[int],
    stride_dhw: Sequence[int],
) -> np.ndarray:
    """Project the centre of each latent cell into a standard radiograph.

    With a geometry, along the ray through that point. Without one (a real radiograph) along the axis of the volume:
    the middle of the picture's content lies on the middle of the volume, and one scale holds for both axes. It is the
    pixel spacing over the magnification of a chest stand (1.10) where the file tells one that can be true
    (`believed_spacing_mm`); else the content covers the volume's field, (D, W) in a frontal and (D, H) in a lateral
    picture, and just fits it in one axis. Both are assumptions: nobody knows where a patient of a real radiograph
    stood.

    Args:
        geometry: of the rendered picture, None for a real radiograph.
        view: frontal or lateral.
        xray: the picture as `dataset.xray.load_xray` read it.
        affine: (4, 4) of the volume, (d, h, w, 1) -> RAS+ mm.
        shape_dhw: voxels of the volume. Of crops, the whole volume's: cut the grid like the latent.
        stride_dhw: voxels of a latent cell.

    Returns:
        float32 (d, h, w, 2), (x, y) of ``xray.image`` in [-1, 1] as `grid_sample(align_corners=False)` takes them;
        outside that range a cell is outside the picture.

    Raises:
        ConfigurationError: the geometry is of another view, or the stride is not positive.
    """
    if geometry is not None and geometry.view != view:
        raise ConfigurationError(f"the geometry is of a {geometry.view} picture, a {view} one is needed")
    if len(stride_dhw) != 3 or min(stride_dhw) < 1:
        raise ConfigurationError(f"stride {list(stride_dhw)}: three positive numbers [D, H, W] are needed")
    size = xray.image.shape[-1]
    cells = np.stack(np.meshgrid(*map(np.arange, latent_shape(shape_dhw, stride_dhw)), indexing="ij"), axis=-1)
    if geometry is not None:
        points_mm = voxel_to_world(cells, latent_affine(affine, stride_dhw))
        in_front = (points_mm - geometry.source_mm) @ geometry.normal > 1.0
        pixels = geometry.project(np.where(in_front[..., None], points_mm, geometry.first_pixel_mm))
        places = xray.placement.standard_pixel(pixels[..., 0], pixels[..., 1])  # type: ignore[arg-type]
        row, column = np.where(in_front, places[0], -_FAR * size), np.asarray(places[1])
    else:
        row, column = _along_axis(view, xray, affine, shape_dhw, (cells + 0.5) * np.asarray(stride_dhw))
    grid = (2 * np.stack([column, row], axis=-1) + 1) / size - 1  # pixel centres are whole numbers
    return np.clip(grid, -_FAR, _FAR).astype(np.float32)


def _along_axis(
    view: View, xray: XRay, affine: np.ndarray, shape_dhw: Sequence[int], edges_vox: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(row, column) of points (..., 3), given in voxels from the volume's first corner, under a parallel beam."""
    across = 2 if view == "frontal" else 1
    mm, size = spacing_mm(affine), xray.image.shape[-1]
    # the shorter axis of the content is what the padding leaves; where that is odd, half a pixel is not known
    height, width = (size - 2 * pad for pad in xray.placement.pad)
    tall_mm, wide_mm = shape_dhw[0] * mm[0], shape_dhw[across] * mm[across]
    if (spacing := believed_spacing_mm(xray)) is not None:
        row_mm, column_mm = (step / _MAGNIFICATION for step in spacing)
    else:
        row_mm = column_mm = max(tall_mm / height, wide_mm / width)
    down_mm = tall_mm / 2 - edges_vox[..., 0] * mm[0]
    right_mm = edges_vox[..., across] * mm[across] - wide_mm / 2
    middle = (size - 1) / 2
    return middle + down_mm / row_mm, middle + right_mm / column_mm
