"""Frames of one series -> one regular stack in space, or the reason why they are none.

Positions are measured along the slice normal, gaps against the median gap. A volume is made only when every slice lies
where a regular grid wants it; an irregular one would be stretched silently by any reader that assumes a spacing.

Reference: DICOM PS3.3 C.7.6.2.1.1 (position and orientation).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dataset.nifti_header import MAX_SPACING_MM, MIN_SPACING_MM
from errors import InputError
from preprocess.dicom_elements import token
from preprocess.dicom_header import Slice

_SAME_DIRECTION = 1e-3  # direction cosines carry 4 decimals at least
_SAME_SPACING = 1e-3  # relative
_SAME_POSITION_MM = 1e-2
# A slice may be off its place by this share of the gap: scanners round positions to 0.1 mm.
_OFF_GRID = 0.15
_MISSING_GAP = 1.5  # a gap this much wider than the median misses slices
_TILT_DEG = 0.5  # worth a word
_NAMED = 3  # files named in a message
# Slices whose numbers leave some out, and that lie further apart than this share of their thickness, were thinned.
_THINNED_GAP = 1.5
# What the notes of a stack say, each with its figures around it; the analysis of a data set shows them as flags.
ENDS_MISSING = "the ends of the stack are missing"
END_DOUBTFUL = "an end of the stack may be missing"
THINNED = "slices between the others may be missing"


@dataclass(frozen=True)
class Stack:
    """Slices in order along the normal.

    Attributes:
        slices: from low to high position.
        affine: (4, 4) index (column, row, slice, 1) -> RAS+ mm, exact, sheared where the gantry was tilted.
        gap_mm: distance of neighbouring planes along the normal.
        tilt_deg: angle between the normal and the line along which the slices are stacked.
        shift_mm: in-plane drift from slice to slice, (along rows, along columns); 0 without a tilt.
        off_grid_mm: the largest distance of a slice from its place.
        duplicates: frames dropped because another shows the same at the same place.
        notes: what a user should know.
    """

    slices: tuple[Slice, ...]
    affine: np.ndarray
    gap_mm: float
    tilt_deg: float
    shift_mm: tuple[float, float]
    off_grid_mm: float
    duplicates: int = 0
    notes: tuple[str, ...] = ()

    @property
    def is_tilted(self) -> bool:
        """Whether the drift over the whole stack exceeds a pixel."""
        pixel_mm = min(self.slices[0].spacing_mm)
        return math.hypot(*self.shift_mm) * (len(self.slices) - 1) > pixel_mm


def build_stack(
    frames: Sequence[Slice], same_pixels: Callable[[Slice, Slice], bool], *, allow_partial: bool = False
) -> Stack:
    """Order the frames of one series and check that they form a regular stack.

    Args:
        frames: two at least, of one series, in any order.
        same_pixels: whether two frames show the same; asked only of frames at the same position.
        allow_partial: take a series of which the header says that more images belong to it.

    Raises:
        InputError: the frames do not form one volume; the message says which, and how far apart, in mm.
    """
    _require_usable(frames)
    _require_alike(frames)
    first = frames[0]
    along_row, along_column = _axes(first)
    normal = np.cross(along_row, along_column)
    ordered = sorted(frames, key=lambda frame: float(np.dot(frame.position_mm, normal)))
    kept, dropped = _without_duplicates(ordered, normal, same_pixels)
    if len(kept) < 2:
        raise InputError("all slices lie at one position: a volume needs two at least")
    notes = _completeness(kept, allow_partial)
    positions = np.array([frame.position_mm for frame in kept])
    step = (positions[-1] - positions[0]) / (len(kept) - 1)
    in_plane = np.stack([along_row, along_column])
    shift = in_plane @ step
    tilt_deg = math.degrees(math.atan2(float(np.hypot(*shift)), float(step @ normal)))
    gap_mm, off_grid_mm = _regular_gap(kept, positions @ normal, tilt_deg)
    if not MIN_SPACING_MM <= gap_mm <= MAX_SPACING_MM:
        raise InputError(f"{first.label}: slices are {gap_mm:.4g} mm apart, which is no CT's: export it again")
    notes += _thinned(kept, gap_mm)
    drift = (positions - positions[0] - np.arange(len(kept))[:, None] * step) @ in_plane.T
    worst = int(np.abs(drift).max(axis=1).argmax())
    if np.abs(drift[worst]).max() > 0.5 * min(first.spacing_mm):
        raise InputError(
            f"{kept[worst].label} is shifted in its plane by {np.abs(drift[worst]).max():.1f} mm against the others: "
            "not one stack, export it again"
        )
    affine = np.eye(4)
    # columns are LPS+ here; RAS+ has x and y reversed
    affine[:3, 0] = along_row * first.spacing_mm[1]
    affine[:3, 1] = along_column * first.spacing_mm[0]
    affine[:3, 2] = step
    affine[:3, 3] = positions[0]
    affine[:2] *= -1
    drift_mm = float(shift[0]), float(shift[1])
    return Stack(tuple(kept), affine + 0.0, gap_mm, tilt_deg, drift_mm, off_grid_mm, dropped, notes)


def without_localizers(frames: Sequence[Slice]) -> tuple[list[Slice], int]:
    """Frames without the scouts that some scanners keep in the series, and how many those are."""
    kept = [frame for frame in frames if "LOCALIZER" not in frame.image_type]
    return (kept, len(frames) - len(kept)) if kept else (list(frames), 0)


def as_orthogonal(stack: Stack, affine: np.ndarray) -> Stack:
    """The same stack after its tilt was resampled away."""
    return replace(stack, affine=affine, shift_mm=(0.0, 0.0))


def _require_usable(frames: Sequence[Slice]) -> None:
    for frame in frames:
        issue = frame.issue
        if not frame.position_mm or not frame.orientation:
            issue = issue or "has no position and orientation: it cannot be placed in space"
        elif len(frame.spacing_mm) != 2 or min(frame.spacing_mm) <= 0:
            issue = issue or "has no pixel spacing: export it again"
        elif min(frame.spacing_mm) < MIN_SPACING_MM or max(frame.spacing_mm) > MAX_SPACING_MM:
            sizes = "×".join(f"{mm:.4g}" for mm in frame.spacing_mm)
            issue = issue or f"has pixels of {sizes} mm, which is no CT's: export it again"
        elif frame.slope is None or frame.intercept is None:
            issue = issue or "has no rescale slope and intercept, its values are no HU: export it again"
        elif frame.slope <= 0:
            issue = issue or f"has the rescale slope {frame.slope:g}: export it again"
        elif frame.rescale_type not in ("", "HU", "US"):
            issue = issue or f"is rescaled to {token(frame.rescale_type)}, not to HU"
        if issue:
            raise InputError(f"{frame.label}: {issue}")
        row, column = np.array(frame.orientation[:3]), np.array(frame.orientation[3:])
        lengths = np.linalg.norm(row), np.linalg.norm(column)
        if max(abs(length - 1) for length in lengths) > _SAME_DIRECTION or abs(row @ column) > _SAME_DIRECTION:
            raise InputError(f"{frame.label}: its image orientation is no pair of perpendicular directions")


def _require_alike(frames: Sequence[Slice]) -> None:
    """One series is one patient, one grid, one direction."""
    first = frames[0]
    for frame in frames[1:]:
        pixels, other = frame.pixels, first.pixels
        between = f"{first.label} and {frame.label}"
        if frame.patient != first.patient:
            raise InputError(f"{between} are of different patients under one series UID: sort the files first")
        if frame.study_uid != first.study_uid or frame.series_uid != first.series_uid:
            raise InputError(f"{between} are of different series: sort the files first")
        if (pixels.rows, pixels.columns) != (other.rows, other.columns):
            sizes = f"{other.rows}×{other.columns} and {pixels.rows}×{pixels.columns}"
            raise InputError(f"{between} differ in shape ({sizes} pixels): not one volume")
        if not np.allclose(frame.spacing_mm, first.spacing_mm, rtol=_SAME_SPACING, atol=0):
            sizes = " and ".join("×".join(f"{mm:g}" for mm in each.spacing_mm) for each in (first, frame))
            raise InputError(f"{between} differ in pixel spacing ({sizes} mm): not one volume")
        if np.abs(np.subtract(frame.orientation, first.orientation)).max() > _SAME_DIRECTION:
            raise InputError(f"{between} differ in orientation: not one volume")
        if frame.frame_of_reference != first.frame_of_reference:
            raise InputError(f"{between} have different frames of reference, their positions do not compare")


def _axes(frame: Slice) -> tuple[np.ndarray, np.ndarray]:
    return np.array(frame.orientation[:3]), np.array(frame.orientation[3:])


def _without_duplicates(
    ordered: Sequence[Slice], normal: np.ndarray, same_pixels: Callable[[Slice, Slice], bool]
) -> tuple[list[Slice], int]:
    kept: list[Slice] = []
    for frame in ordered:
        place = float(np.dot(frame.position_mm, normal))
        if kept and place - float(np.dot(kept[-1].position_mm, normal)) < _SAME_POSITION_MM:
            if not same_pixels(kept[-1], frame):
                raise InputError(
                    f"{kept[-1].label} and {frame.label} lie at the same position ({place:.2f} mm) with different "
                    "pixels: several phases or reconstructions under one series UID, separate them first"
                )
            continue
        kept.append(frame)
    return kept, len(ordered) - len(kept)


def _regular_gap(kept: Sequence[Slice], places_mm: np.ndarray, tilt_deg: float) -> tuple[float, float]:
    """The gap, and the largest distance from a regular grid.

    Raises:
        InputError: slices are missing, or the gaps vary.
    """
    gaps = np.diff(places_mm)
    median = float(np.median(gaps))
    holes = np.flatnonzero(gaps > _MISSING_GAP * median)
    gap_mm = float(places_mm[-1] - places_mm[0]) / (len(kept) - 1)
    off_grid = float(np.abs(places_mm - places_mm[0] - gap_mm * np.arange(len(kept))).max())
    if off_grid <= _OFF_GRID * median:
        return gap_mm, off_grid
    regular = np.abs(np.delete(gaps, holes) - median) <= 2 * _OFF_GRID * median
    if len(holes) and regular.all():
        missing = sum(max(1, round(float(gaps[hole]) / median) - 1) for hole in holes)
        named = "; ".join(
            f"a gap of {gaps[hole]:.1f} mm between {kept[hole].label} and {kept[hole + 1].label}"
            for hole in holes[:_NAMED]
        )
        raise InputError(f"about {missing} slices are missing where slices are {median:g} mm apart: {named}: copy them")
    odd = int(np.abs(gaps - median).argmax())
    tilted = f", and the gantry was tilted by {tilt_deg:.1f}°" if tilt_deg > _TILT_DEG else ""
    raise InputError(
        f"the slices are not equally spaced: gaps of {gaps.min():.2f} to {gaps.max():.2f} mm (median {median:.2f}), "
        f"the oddest between {kept[odd].label} and {kept[odd + 1].label}{tilted}: not one regular volume"
    )


def _completeness(kept: Sequence[Slice], allow_partial: bool) -> tuple[str, ...]:
    """Whether the ends are there, as far as a header can tell.

    Raises:
        InputError: the header declares more images than there are, and the ends are what is missing.
    """
    numbers = [frame.instance for frame in kept if frame.instance is not None]
    low, high = (min(numbers), max(numbers)) if len(numbers) == len(kept) else (0, 0)
    contiguous = len(set(numbers)) == len(kept) and high - low + 1 == len(kept)
    declared = min(frame.declared for frame in kept)
    if contiguous and low >= 1 and declared > len(kept) and high <= declared:
        what = f"{declared} images were acquired and instances {low} to {high} are here: {ENDS_MISSING}"
        if not allow_partial:
            raise InputError(f"{what}: copy them, or allow it by the rule allow_partial")
        return (what,)
    if contiguous and low > 1:
        return (f"instances {low} to {high}: {END_DOUBTFUL}",)
    return ()


def _thinned(kept: Sequence[Slice], gap_mm: float) -> tuple[str, ...]:
    """A note where a copy may hold every n-th slice only: the gaps are regular, and nothing else shows it."""
    numbers = [frame.instance for frame in kept if frame.instance is not None]
    steps = set(np.abs(np.diff(numbers)).tolist()) if len(numbers) == len(kept) else set()
    thickness_mm = kept[0].thickness_mm
    if len(steps) != 1 or min(steps) < 2 or not thickness_mm or gap_mm <= _THINNED_GAP * thickness_mm:
        return ()
    every = f"every {min(steps)}. instance is here, {gap_mm:.2f} mm apart at a thickness of {thickness_mm:g} mm"
    return (f"{every}: {THINNED}",)
