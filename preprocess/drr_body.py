"""Where the patient is in a CT volume: a radiograph shows no couch, so everything outside the body becomes air."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from dataset.geometry import spacing_mm
from errors import InputError
from params import HU_AIR

# Skin and fat are above, clothes, foam and lungs below.
_TISSUE_HU = -400
# The mask is found on a grid of about this spacing: fine enough for skin, 20 times cheaper than a native grid.
_COARSE_MM = 2.0
# Shells thinner than twice this (couch top, tubes, blankets) are not body.
_SHELL_MM = 2.0
# What is worn away with them (skin, thin chest walls) is found again this far along the tissue.
_REGROWTH_MM = 24.0
# Slices in which a gap in the chest wall keeps the lungs from being filled are bridged by those above and below.
_BRIDGE_MM = 20.0


@dataclass(frozen=True)
class Body:
    """A volume with air outside the body.

    Args:
        hu: int16 (D, H, W); a copy, cropped to nothing.
        bounding_box_vox: first and last (exclusive) index (d, h, w) of the body.
        removed_voxels: how many were set to air that were not air before (couch, clothes, cables).
    """

    hu: np.ndarray
    bounding_box_vox: tuple[tuple[int, int, int], tuple[int, int, int]]
    removed_voxels: int


def isolate_body(hu: np.ndarray, affine: np.ndarray) -> Body:
    """Set everything outside the largest connected piece of tissue to air; lungs and bowel gas inside it stay.

    Args:
        hu: int16 (D, H, W).
        affine: (4, 4).

    Raises:
        InputError: there is no tissue.
    """
    mask = body_mask(hu, affine)
    air = np.int16(HU_AIR)
    removed = int(np.count_nonzero(~mask & (hu > air + 100)))  # noise of air is not counted
    occupied = [np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis))) for axis in range(3)]
    first, last = (int(line[0]) for line in occupied), (int(line[-1]) + 1 for line in occupied)
    box = (tuple(first), tuple(last))
    return Body(np.where(mask, hu, air), box, removed)  # type: ignore[arg-type]


def body_mask(hu: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """The body, filled slice by slice, as bool (D, H, W); some 2 mm generous at the skin.

    Where tissue is cut by all four sides of the field of view there is no outside, and everything is body.

    Raises:
        InputError: there is no tissue.
    """
    steps = [max(1, round(_COARSE_MM / spacing)) for spacing in spacing_mm(affine)]
    coarse = hu[:: steps[0], :: steps[1], :: steps[2]] > _TISSUE_HU
    grid_mm = [spacing * step for spacing, step in zip(spacing_mm(affine), steps, strict=True)]
    # in plane only: thick slices must not wear away the top and bottom of a scan
    reach = [max(1, round(_SHELL_MM / step_mm)) for step_mm in grid_mm[1:]]
    brush = np.ones((1, 2 * reach[0] + 1, 2 * reach[1] + 1), dtype=bool)
    # the border counts as body for the erosion, since a small field of view cuts through it
    labels, count = ndimage.label(ndimage.binary_erosion(coarse, brush, border_value=1))
    if count == 0:
        raise InputError(f"no body: no tissue above {_TISSUE_HU} HU in one piece: check that the volume is a CT in HU")
    body = labels == int(np.argmax(np.bincount(labels.ravel())[1:])) + 1
    if all(edge.any() for edge in (body[:, 0], body[:, -1], body[:, :, 0], body[:, :, -1])):
        return np.ones(hu.shape, dtype=bool)
    steps_back = max(1, round(_REGROWTH_MM / (min(reach) * min(grid_mm[1:]))))
    body = ndimage.binary_dilation(body, brush, iterations=steps_back, mask=coarse)
    body = ndimage.binary_dilation(body, np.ones((1, 3, 3), dtype=bool))  # what the coarse grid missed of the skin
    for plane in body:
        ndimage.binary_fill_holes(plane, output=plane)
    body = _bridge(body, max(1, round(_BRIDGE_MM / grid_mm[0])))
    indices = [
        np.minimum(np.arange(n) // step, length - 1)
        for n, step, length in zip(hu.shape, steps, body.shape, strict=True)
    ]
    return np.asarray(body[np.ix_(*indices)])


def _bridge(body: np.ndarray, gap: int) -> np.ndarray:
    """Close gaps along D of up to ``gap`` slices; the ends of the scan stay as they are."""
    width = 2 * (gap // 2) + 1
    margin = [(width, width), (0, 0), (0, 0)]
    # nothing grows in from the margins, and nothing is worn away there
    grown = ndimage.binary_dilation(np.pad(body, margin), np.ones((width, 1, 1), dtype=bool))
    return (
        np.asarray(ndimage.binary_erosion(grown, np.ones((width, 1, 1), dtype=bool), border_value=1)[width:-width])
        | body
    )
