"""What can be measured in a chest CT without a trained network: body, lungs, heart and opacified vessels.

The rules are thresholds and topology, meant to be robust rather than fine: generated volumes are blurred or noisy, and
the same rule is applied to truth and generation. Each measure says what it is a proxy of; agreement with the phantom's
known masks is tested. Volumes are on the standard axes (D inferior→superior, H anterior→posterior, W right→left).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from dataset import body as bodies
from dataset.geometry import spacing_mm
from errors import InputError

# Half-way between aerated lung (-850) and soft tissue (50): blur moves an edge at half height by nothing.
_AIR_HU = -400.0
_SKIN_HU = -500.0
# Blood without contrast stays below 80 HU and muscle below 70; an opacified vessel is above 200 where CTPA can be read.
_CONTRAST_HU = 150.0
_HEART_HU = 0.0  # above the fat around the heart
# A lung smaller than this is collapsed, absent or noise: measures that need two lungs are NaN then.
_MIN_LUNG_ML = 100.0
# Lungs that touch (anterior junction, bronchi at coarse voxels) are cut where erosion up to this depth parts them.
_PART_MM = 24.0
# The heart lies in front of the spine: of each slice's lung extent from front to back, this share. It lies on the
# diaphragm, whose dome is where the lungs' area has fallen to this share of the greatest, and fills this share of the
# way from there to the apex. Chosen on 64 phantoms (10×6.5×6.5 mm) for the highest correlation with the true heart.
_FRONT_SHARE, _DOME_SHARE, _HEIGHT_SHARE = 0.62, 0.8, 0.5
# A column of the frontal shadow counts where it holds this share of the deepest: what a radiograph would show as edge.
_SHADOW_SHARE = 0.4


@dataclass(frozen=True)
class Segmentation:
    """Masks of one volume, bool (D, H, W).

    Attributes:
        body: everything under the skin, lungs and bowel gas included.
        lung_right: air of the right lung; trachea and large bronchi may belong to either lung.
        lung_left: of the left.
        heart: soft tissue between the lungs, in front of the spine and above the dome of the diaphragm, up to half-way
            to the apex: the heart, the roots of the great vessels, and what of the liver's top reaches between.
        vessels: what is opacified (above 150 HU) in the lungs and between them in front of the spine, the heart's
            chambers included. Its volume follows that of the blood that contrast medium has reached, not that of all
            blood: where the contrast is poor there is less of it.
    """

    body: np.ndarray
    lung_right: np.ndarray
    lung_left: np.ndarray
    heart: np.ndarray
    vessels: np.ndarray

    @property
    def lungs(self) -> np.ndarray:
        """Both lungs."""
        return self.lung_right | self.lung_left


def segment(hu: np.ndarray, affine: np.ndarray) -> Segmentation:
    """Segment a chest CT; what is not found is an empty mask, and nothing is raised for a volume that shows no chest.

    Args:
        hu: (D, H, W), any real dtype, HU; NaN counts as air.
        affine: (4, 4) index (d, h, w, 1) -> RAS+ mm.

    Raises:
        InputError: the volume is not three-dimensional, or the affine is singular.
    """
    if hu.ndim != 3 or 0 in hu.shape:
        raise InputError(f"volume {list(hu.shape)}: (D, H, W) is needed for anatomy")
    step_mm = spacing_mm(affine)
    hu = np.nan_to_num(hu.astype(np.float32), nan=-1000.0, posinf=3000.0, neginf=-1000.0)
    body = body_mask(hu, affine)
    right, left = _lungs(hu, body, step_mm)
    between = _between(right, left)
    heart = between & (hu > _HEART_HU) & _heart_slices(right | left)[:, None, None]
    inside = between | ndimage.binary_closing(right | left)
    return Segmentation(body, right, left, heart, inside & (hu > _CONTRAST_HU) & body)


def body_mask(hu: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """`dataset.body.body_mask` without its generous margin: the skin lies where tissue begins, at -500 HU.

    Returns:
        bool (D, H, W); empty where there is no tissue.
    """
    try:
        generous = bodies.body_mask(hu, affine)
    except InputError:
        return np.zeros(hu.shape, dtype=bool)
    if generous.all():
        return generous
    core = ndimage.binary_erosion(generous, np.ones((1, 3, 3), dtype=bool), border_value=1)
    mask = core | (generous & (hu > _SKIN_HU))
    for plane in mask:
        ndimage.binary_fill_holes(plane, output=plane)
    return np.asarray(mask)


def measure(hu: np.ndarray, affine: np.ndarray) -> dict[str, float]:
    """Sizes of what `segment` finds.

    Args:
        hu: (D, H, W) HU.
        affine: (4, 4).

    Returns:
        ``body_ml``, ``lung_ml``, ``lung_right_ml``, ``lung_left_ml``, ``vessel_ml`` (0 where nothing is found; the body
        is what of it lies in the field, lungs included), ``heart_ml``
        (`Segmentation.heart`, about 1.4 times the heart's own volume), ``heart_shadow_cm2`` (its area in the frontal
        projection) and ``body_width_mm`` (mean over the middle half of the lungs' slices, shoulders and abdomen left
        out). Those of the heart are NaN without two lungs, the width is NaN without a body.

    Raises:
        InputError: as `segment`.
    """
    return measure_segmentation(segment(hu, affine), affine)


def measure_segmentation(found: Segmentation, affine: np.ndarray) -> dict[str, float]:
    """As `measure`, of masks that are already there (for instance a phantom's own)."""
    step_mm = spacing_mm(affine)
    ml = math.prod(step_mm) / 1000.0
    right_ml, left_ml = float(found.lung_right.sum()) * ml, float(found.lung_left.sum()) * ml
    two_lungs = min(right_ml, left_ml) >= _MIN_LUNG_ML
    return {
        "body_ml": float(found.body.sum()) * ml,
        "lung_ml": right_ml + left_ml,
        "lung_right_ml": right_ml,
        "lung_left_ml": left_ml,
        "heart_ml": float(found.heart.sum()) * ml if two_lungs else math.nan,
        "heart_shadow_cm2": _shadow_cm2(found.heart, step_mm) if two_lungs else math.nan,
        "vessel_ml": float(found.vessels.sum()) * ml,
        "body_width_mm": _body_width_mm(found, step_mm),
    }


def dice(first: np.ndarray, second: np.ndarray) -> float:
    """Dice's coefficient 2|A∩B| / (|A| + |B|) of two bool masks; 1 for two empty ones.

    Raises:
        InputError: the shapes differ.
    """
    if first.shape != second.shape:
        raise InputError(f"masks {list(first.shape)} and {list(second.shape)}: Dice needs one grid")
    total = int(first.sum()) + int(second.sum())
    return 1.0 if total == 0 else 2.0 * int((first & second).sum()) / total


def _lungs(hu: np.ndarray, body: np.ndarray, step_mm: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Right and left lung: the greatest piece of air on either side of the body's middle, parted by erosion."""
    air = body & (hu < _AIR_HU)
    empty = np.zeros(hu.shape, dtype=bool)
    if not air.any():
        return empty, empty
    # distance to tissue in mm; the body's cut ends are no wall
    depth_mm = ndimage.distance_transform_edt(np.pad(air, ((1, 1), (0, 0), (0, 0)), mode="edge"), sampling=step_mm)
    depth_mm = depth_mm[1:-1]
    middle = float(ndimage.center_of_mass(body)[2])
    least = _MIN_LUNG_ML * 1000.0 / math.prod(step_mm)
    seeds = None
    for reach_mm in (0.0, *np.arange(min(step_mm), _PART_MM, min(step_mm))):
        labels, count = ndimage.label(air & (depth_mm > reach_mm))
        if count == 0:
            break
        sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
        if reach_mm == 0.0:
            # stomach and bowel gas are pieces of their own, and small
            air = np.isin(labels, 1 + np.flatnonzero(sizes >= max(least, 0.1 * sizes.max())))
            if not air.any():
                return empty, empty
            labels, count = ndimage.label(air)
            sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
        centres = np.array(ndimage.center_of_mass(labels > 0, labels, range(1, count + 1)))[:, 2]
        sides = [np.flatnonzero(side) for side in (centres < middle, centres >= middle)]
        if all(len(side) for side in sides):
            pair = [int(side[np.argmax(sizes[side])]) for side in sides]
            if min(sizes[pair]) >= 0.25 * max(sizes[pair]):
                seeds = [labels == index + 1 for index in pair]
                break
    if seeds is None:  # one lung, or two that nothing parts: the body's middle does
        right = air & (np.arange(hu.shape[2]) < middle)
        return right, air & ~right
    nearer = [ndimage.distance_transform_edt(~seed, sampling=step_mm) for seed in seeds]
    right = air & (nearer[0] <= nearer[1])
    return right, air & ~right


def _between(right: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Where the right lung is on one side and the left on the other within a row (d, h), in front of the spine."""
    columns, rows = np.arange(right.shape[2]), np.arange(right.shape[1])
    # the innermost column of each lung in a row; rows without it give nothing
    inner_right = np.where(right, columns, -1).max(axis=2)
    inner_left = np.where(left, columns, right.shape[2]).min(axis=2)
    both = (inner_right >= 0) & (inner_left < right.shape[2])
    between = both[..., None] & (columns > inner_right[..., None]) & (columns < inner_left[..., None])
    has_lung = (right | left).any(axis=2)  # (D, H)
    front = np.where(has_lung, rows, right.shape[1]).min(axis=1)
    back = np.where(has_lung, rows, -1).max(axis=1)
    return np.asarray(between & (rows <= (front + _FRONT_SHARE * (back - front))[:, None])[..., None])


def _heart_slices(lungs: np.ndarray) -> np.ndarray:
    """Slices (D,) from the dome of the diaphragm half-way up to the apex."""
    area = lungs.sum(axis=(1, 2))
    chosen = np.zeros(len(area), dtype=bool)
    if area.any():
        dome = int(np.flatnonzero(area >= _DOME_SHARE * area.max())[0])
        apex = int(np.flatnonzero(area)[-1])
        chosen[dome : dome + round(_HEIGHT_SHARE * (apex - dome)) + 1] = True
    return chosen


def _shadow_cm2(heart: np.ndarray, step_mm: tuple[float, float, float]) -> float:
    thickness = heart.sum(axis=1)  # (D, W)
    shadow = thickness >= max(1.0, _SHADOW_SHARE * thickness.max())
    return float(shadow.sum()) * step_mm[0] * step_mm[2] / 100.0


def _body_width_mm(found: Segmentation, step_mm: tuple[float, float, float]) -> float:
    """Mean width of the body over the middle half of the lungs' slices (of the volume's where there are no lungs)."""
    slices = np.flatnonzero(found.lungs.any(axis=(1, 2)))
    first, last = (int(slices[0]), int(slices[-1])) if len(slices) else (0, found.body.shape[0] - 1)
    quarter = (last - first + 1) // 4
    widths = _extent(np.asarray(found.body[first + quarter : last + 1 - quarter].any(axis=1)))
    widths = widths[widths > 0]
    return float(widths.mean()) * step_mm[2] if len(widths) else math.nan


def _extent(mask: np.ndarray) -> np.ndarray:
    """Columns from the first to the last set one of each row of (D, W); 0 for empty rows."""
    index = np.arange(mask.shape[1])
    extent = np.where(mask, index, -1).max(axis=1) - np.where(mask, index, mask.shape[1]).min(axis=1) + 1
    return np.where(mask.any(axis=1), extent, 0)
