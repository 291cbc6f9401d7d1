"""Contrast phase of a chest CT from its voxels: how bright is the blood in the heart and the great vessels?

Headers are unreliable here (a bolus is noted for scans without one, and the other way round), so the blood is measured.
Blood is told from bone by homogeneity: a ball of 12 mm fits into the aorta, the pulmonary trunk and the heart, and its
voxels agree within noise; cortical bone beside marrow, calcium and vessel walls do not. Vertebrae that are homogeneous
nevertheless lie behind.

Pulmonary arteries below 200 HU are called suboptimal (Bayraktaroglu et al. 2020, doi 10.5812/iranjradiol.97230).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

# The phases, by the HU of blood. Without contrast blood has 30 to 60 HU.
NONE, WEAK, ANGIOGRAPHIC, UNKNOWN = "none", "weak", "angiographic", "unknown"
ENHANCED_HU, ANGIOGRAPHIC_HU = 100.0, 200.0

_COARSE_MM = 3.0  # averaging to this takes away the noise of sharp kernels, and the great vessels keep their centres
_LUNG_HU = -400.0
_MIN_LUNGS_ML = 500.0
_BALL_RADIUS_MM = 6.0
_HOMOGENEOUS_HU = 30.0
# Denser inflow in the superior vena cava, and metal, are no measure of the arteries.
_DENSEST_HU = 800.0
_MIN_CORE_ML = 5.0
_MIN_TISSUE_ML = 20.0
# The part of the lungs' (or the body's) width, R to L, and depth, A to P, that is searched.
_WIDTH, _DEPTH = (0.25, 0.75), (0.10, 0.75)
# A group of balls whose middle lies further back than this share of that depth is a vertebra.
_VERTEBRA_BEHIND = 0.78


@dataclass(frozen=True)
class Contrast:
    """What was measured.

    Attributes:
        phase: "none", "weak", "angiographic", or "unknown" where no mediastinum was found.
        blood_hu: mean of the brightest large group of homogeneous balls; without contrast the 95th percentile of
            homogeneous soft tissue, which is unenhanced blood and muscle; None if unknown.
        core_ml: volume of that group's centres; 0 without contrast.
    """

    phase: str
    blood_hu: float | None
    core_ml: float


def central_contrast(hu: np.ndarray, spacing_mm: tuple[float, float, float]) -> Contrast:
    """Measure the contrast of the central vessels.

    Args:
        hu: (D, H, W) int16 on the standard axes, a chest or a part of one.
        spacing_mm: (d, h, w).
    """
    coarse, spacing = _averaged(hu, spacing_mm)
    voxel_ml = float(np.prod(spacing)) / 1000.0
    mean, spread = _in_balls(coarse, spacing)
    blood_like = (spread < _HOMOGENEOUS_HU) & (mean > 0) & (mean < _DENSEST_HU)
    for region in _central_boxes(coarse, voxel_ml):
        homogeneous = np.zeros_like(blood_like)
        homogeneous[region] = blood_like[region]
        if homogeneous.sum() * voxel_ml >= _MIN_TISSUE_ML:
            return _brightest(mean, homogeneous, region[1], voxel_ml)
    return Contrast(UNKNOWN, None, 0.0)


def _brightest(mean: np.ndarray, homogeneous: np.ndarray, depth: slice, voxel_ml: float) -> Contrast:
    """The brightest large group of ball centres that is no vertebra; ``depth`` is the searched range, A to P."""
    labels, _ = ndimage.label(homogeneous & (mean >= ENHANCED_HU), structure=np.ones((3, 3, 3)))
    brightest = Contrast(NONE, float(np.percentile(mean[homogeneous], 95)), 0.0)
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        core = labels[box] == number
        core_ml = float(core.sum()) * voxel_ml
        middle = (box[1].start + float(np.nonzero(core)[1].mean()) - depth.start) / (depth.stop - depth.start)
        if core_ml < _MIN_CORE_ML or middle > _VERTEBRA_BEHIND:
            continue
        blood_hu = float(mean[box][core].mean())
        if brightest.phase == NONE or blood_hu > (brightest.blood_hu or 0.0):
            brightest = Contrast(WEAK if blood_hu < ANGIOGRAPHIC_HU else ANGIOGRAPHIC, blood_hu, core_ml)
    return brightest


def _averaged(hu: np.ndarray, spacing_mm: tuple[float, float, float]) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Mean over blocks of about 3 mm, slab by slab; a remainder at the far ends is left out."""
    factors = [max(1, min(round(_COARSE_MM / mm), size)) for mm, size in zip(spacing_mm, hu.shape, strict=True)]
    d, h, w = (size // factor for size, factor in zip(hu.shape, factors, strict=True))
    coarse = np.empty((d, h, w), dtype=np.float32)
    for index in range(d):
        slab = hu[index * factors[0] : (index + 1) * factors[0], : h * factors[1], : w * factors[2]]
        blocks = slab.reshape(factors[0], h, factors[1], w, factors[2])
        coarse[index] = blocks.mean(axis=(0, 2, 4), dtype=np.float32)
    d_mm, h_mm, w_mm = (mm * factor for mm, factor in zip(spacing_mm, factors, strict=True))
    return coarse, (d_mm, h_mm, w_mm)


def _central_boxes(coarse: np.ndarray, voxel_ml: float) -> Iterator[tuple[slice, slice, slice]]:
    """Boxes to search, the better first: between the lungs; then, for slabs and crops, the middle of the body."""
    tissue = coarse > _LUNG_HU
    labels, count = ndimage.label(tissue)
    if count:
        sizes = np.bincount(labels.ravel())
        sizes[0] = 0
        tissue = labels == sizes.argmax()
    inside = np.stack([ndimage.binary_fill_holes(plane) for plane in tissue])
    lungs = ndimage.binary_opening(inside & (coarse < _LUNG_HU))
    if lungs.sum() * voxel_ml >= _MIN_LUNGS_ML:
        yield _box(lungs, (5, 2, 2))  # a little gas in the bowel, or outside, moves no percentile
    if inside.any():
        yield _box(inside, (0, 1, 1))


def _box(mask: np.ndarray, percent: tuple[int, int, int]) -> tuple[slice, slice, slice]:
    """The central part of what a mask spans between its percentiles along each axis."""
    box = []
    for index, low, (start, stop) in zip(np.nonzero(mask), percent, ((0.0, 1.0), _DEPTH, _WIDTH), strict=True):
        begin, end = np.percentile(index, (low, 100 - low))
        box.append(slice(int(begin + start * (end - begin)), int(begin + stop * (end - begin)) + 1))
    return box[0], box[1], box[2]


def _in_balls(coarse: np.ndarray, spacing_mm: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation in the ball around each voxel."""
    reach = [int(_BALL_RADIUS_MM / mm) for mm in spacing_mm]
    axes = [np.arange(-count, count + 1) * mm for count, mm in zip(reach, spacing_mm, strict=True)]
    squared = sum(np.square(axis) for axis in np.meshgrid(*axes, indexing="ij"))
    ball = (np.asarray(squared) <= _BALL_RADIUS_MM**2).astype(np.float32)
    ball /= ball.sum()
    mean = ndimage.convolve(coarse, ball, mode="nearest")
    square = ndimage.convolve(np.square(coarse), ball, mode="nearest")
    return mean, np.sqrt(np.maximum(square - np.square(mean), 0.0))
