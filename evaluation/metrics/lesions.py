"""Do filling defects survive? Contrast of known emboli against the blood around them, before and after a model.

A model may score well on every image metric and still smooth away what the scan was made for. Here each embolus of a
phantom is looked at by itself: its mean HU minus that of the opacified blood next to it. It has survived where at least
half of that contrast is left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from errors import InputError
from evaluation.metrics.statistics import bootstrap

# Blood is compared within this distance of the clot, without the voxels that touch it (partial volume).
_NEAR_MM = 6.0
# A defect that cannot be seen in the scan itself cannot survive; readers need some 50 HU.
_VISIBLE_HU = 50.0
_MIN_CLOT_VOX, _MIN_BLOOD_VOX = 3, 4
SURVIVING_SHARE = 0.5
# Diameters of the sphere of the same volume, mm: lower ends of the groups in which shares are reported.
SIZE_GROUPS_MM = (0.0, 6.0, 10.0, 15.0)


@dataclass(frozen=True)
class Lesion:
    """One embolus.

    Attributes:
        diameter_mm: of the sphere of its volume.
        contrast_hu: blood minus clot in the scan, positive for a filling defect.
        contrast_after_hu: the same in the other volume.
    """

    diameter_mm: float
    contrast_hu: float
    contrast_after_hu: float

    @property
    def kept(self) -> float:
        """Share of the contrast that is left."""
        return self.contrast_after_hu / self.contrast_hu


def find_lesions(
    hu: np.ndarray, after_hu: np.ndarray, clots: np.ndarray, blood: np.ndarray, spacing_mm: Sequence[float]
) -> list[Lesion]:
    """Contrast of each embolus that the scan shows.

    Args:
        hu: (D, H, W) the scan.
        after_hu: the same patient after a model.
        clots: bool (D, H, W), emboli; touching ones are one.
        blood: bool, lumen of the pulmonary arteries without clots.
        spacing_mm: (d, h, w).

    Returns:
        Emboli of at least three voxels, with blood next to them and at least 50 HU of contrast in the scan.

    Raises:
        InputError: shapes differ.
    """
    if not hu.shape == after_hu.shape == clots.shape == blood.shape or hu.ndim != 3:
        raise InputError(f"scan {list(hu.shape)} and other volume {list(after_hu.shape)}: they and masks need one grid")
    labels, _ = ndimage.label(clots, np.ones((3, 3, 3), dtype=bool))
    margin = [math.ceil(_NEAR_MM / step) for step in spacing_mm]
    found = []
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        around = tuple(slice(max(0, s.start - m), s.stop + m) for s, m in zip(box, margin, strict=True))
        clot = labels[around] == index
        distance_mm = ndimage.distance_transform_edt(~clot, sampling=spacing_mm)
        near = (
            blood[around] & ~ndimage.binary_dilation(clots[around]) & (distance_mm <= max(_NEAR_MM, *_two(spacing_mm)))
        )
        if clot.sum() < _MIN_CLOT_VOX or near.sum() < _MIN_BLOOD_VOX:
            continue
        before, after = (
            float(volume[around][near].mean(dtype=np.float64) - volume[around][clot].mean(dtype=np.float64))
            for volume in (hu, after_hu)
        )
        if before >= _VISIBLE_HU:
            volume_mm3 = float(clot.sum()) * math.prod(spacing_mm)
            found.append(Lesion((6 * volume_mm3 / math.pi) ** (1 / 3), before, after))
    return found


def survival(patients: Mapping[str, Sequence[Lesion]], *, seed: int = 0) -> dict[str, Any]:
    """Share of emboli that survive, by size, with 95 % bootstrap intervals over patients, not over emboli.

    Args:
        patients: lesions by patient; patients without any do not count.
        seed: of the bootstrap.

    Returns:
        ``all`` and one entry a group ("6-10 mm"): ``lesions``, ``patients``, ``survived`` (estimate, low, high: share
        with at least half of the contrast) and ``kept`` (mean share of the contrast). Groups without lesions are left
        out.
    """
    groups = {"all": (0.0, math.inf)}
    for low, high in zip(SIZE_GROUPS_MM, (*SIZE_GROUPS_MM[1:], math.inf), strict=True):
        groups[f"{low:g}-{high:g} mm" if high < math.inf else f"{low:g} mm and more"] = (low, high)
    report: dict[str, Any] = {}
    for name, (low, high) in groups.items():
        chosen = [[one.kept for one in lesions if low <= one.diameter_mm < high] for lesions in patients.values()]
        chosen = [kept for kept in chosen if kept]
        if not chosen:
            continue
        counts = np.array([len(kept) for kept in chosen])
        survived = np.array([sum(share >= SURVIVING_SHARE for share in kept) for kept in chosen])
        interval = bootstrap(survived, counts, statistic=lambda s, n: float(s.sum() / n.sum()), seed=seed)
        report[name] = {
            "lesions": int(counts.sum()),
            "patients": len(chosen),
            "survived": dict(zip(("estimate", "low", "high"), interval, strict=True)),
            "kept": float(np.mean([share for kept in chosen for share in kept])),
        }
    return report


def _two(spacing_mm: Sequence[float]) -> list[float]:
    """At coarse voxels the nearest blood that does not touch the clot is two voxels away."""
    return [2.0 * step for step in spacing_mm]
