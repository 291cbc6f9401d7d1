"""Where the body is in a CT, and what it is made of: what a patch sampler needs to prefer tissue to air."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import ndimage

# Between fat (-100 HU) and aerated lung (-700 HU): the usual threshold of body masks.
BODY_ABOVE_HU = -500
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
# Statistics need no finer grid than this, and a box is rounded outwards: 30 times fewer voxels on a scanner's grid.
_COARSE_MM = 2.8
_MIN_SAMPLES = 32
_IN_PLANE = np.zeros((3, 3, 3), dtype=bool)
_IN_PLANE[1, 1, :] = _IN_PLANE[1, :, 1] = True


def body_statistics(hu: np.ndarray, spacing_mm: tuple[float, float, float]) -> dict[str, Any]:
    """Body box, shares and HU percentiles of a chest CT.

    The body is the largest connected component above `BODY_ABOVE_HU`; what it encloses within an axial slice (lungs,
    airways, gas) belongs to it. Every n-th voxel is looked at, n such that samples are at most 2.8 mm apart (every
    voxel where there are fewer than 32 along an axis).

    Args:
        hu: (D, H, W) int16.
        spacing_mm: (d, h, w).

    Returns:
        JSON-able: ``bounding_box_vox`` ``[[d0, h0, w0], [d1, h1, w1]]``, half open, of the body with all its voxels
        (the whole volume where there is no body); ``share_body`` = ``share_tissue`` + ``share_lung`` (enclosed,
        below the threshold) and ``share_air``, of all voxels; ``hu_percentiles`` of the body, empty without one.
    """
    steps = [
        max(1, min(int(_COARSE_MM / mm), size // _MIN_SAMPLES)) for mm, size in zip(spacing_mm, hu.shape, strict=True)
    ]
    coarse = hu[tuple(slice(step // 2, None, step) for step in steps)]
    tissue = _largest_component(coarse > BODY_ABOVE_HU)
    enclosed = _enclosed(tissue)
    body = tissue | enclosed
    lung = enclosed & (coarse <= BODY_ABOVE_HU)
    values = coarse[body]
    share_body, share_lung = (round(float(mask.mean()), 6) for mask in (body, lung))
    return {
        "bounding_box_vox": _box(body, steps, hu.shape),
        "share_body": share_body,
        "share_tissue": round(share_body - share_lung, 6),
        "share_lung": share_lung,
        "share_air": round(1 - share_body, 6),
        "hu_percentiles": {
            str(percent): int(value)
            for percent, value in zip(PERCENTILES, np.percentile(values, PERCENTILES, method="nearest"), strict=True)
        }
        if values.size
        else {},
    }


def _largest_component(mask: np.ndarray) -> np.ndarray:
    labels, count = ndimage.label(mask)
    if count == 0:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return labels == sizes.argmax()


def _enclosed(tissue: np.ndarray) -> np.ndarray:
    """What tissue surrounds within its axial slice: not connected to the slice's edge."""
    labels, _ = ndimage.label(~tissue, structure=_IN_PLANE)
    outside = np.unique(
        np.concatenate([labels[:, [0, -1]].ravel(), labels[:, :, [0, -1]].ravel(), np.zeros(1, labels.dtype)])
    )
    is_outside = np.zeros(labels.max() + 1, dtype=bool)
    is_outside[outside] = True
    return ~is_outside[labels]


def _box(body: np.ndarray, steps: list[int], shape: tuple[int, ...]) -> list[list[int]]:
    if not body.any():
        return [[0, 0, 0], [int(size) for size in shape]]
    low, high = [], []
    for axis, (step, size) in enumerate(zip(steps, shape, strict=True)):
        hit = np.flatnonzero(body.any(axis=tuple(other for other in range(3) if other != axis)))
        # a sample stands for the voxels up to its neighbours, which are not body
        low.append(max(0, int(hit[0]) * step + step // 2 - (step - 1)))
        high.append(min(size, int(hit[-1]) * step + step // 2 + step))
    return [low, high]
