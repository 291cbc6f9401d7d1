"""One look for radiographs of any make: collimation borders off, one size, one histogram.

The histogram method is that of Nyúl, Udupa and Zhang, "New variants of a method of MRI scale standardization", IEEE
TMI 19 (2000): percentiles of a picture are moved to fixed places and what lies between is interpolated. The map is
monotone, so it never swaps bright and dark, and it undoes any change of brightness and contrast.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from dataset.xray_decode import MIN_SIDE
from errors import InputError

# Percentiles of the middle of a picture, and where they go: the mean of 32 frontal radiographs (24 PA and 8 AP of
# the COVID-19 image repository, Hannover Medical School), each scaled so that the outer two lie at 0.05 and 0.95.
LANDMARK_PERCENTILES = (0.5, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 99.5)
STANDARD_LANDMARKS = (0.05, 0.224, 0.322, 0.418, 0.512, 0.589, 0.647, 0.697, 0.746, 0.806, 0.95)

# A border line varies by less than this share of the picture's range, apart from the few pixels of a marker.
_BORDER_VARIATION = 0.03
_MARKER_PERCENT = 2.0
# and is as dark or bright as the darkest or brightest of the picture, up to this share of the range
_BORDER_EXTREME = 0.06
# Share of height and width about the middle that counts for the histogram: markers, shutters that were held at an angle
# and the air beside the patient, whose amount says nothing about tissue, lie outside it. No threshold takes part, so
# that any tone curve of a vendor gives the same landmarks.
_MIDDLE = 0.8


@dataclass(frozen=True)
class Placement:
    """Where the pixels of a standard picture come from.

    Args:
        crop: (top, left) pixel of the upright file at which the kept part begins.
        scale: (row, column) file pixels for one pixel of the standard picture.
        pad: (top, left) rows and columns of padding.
    """

    crop: tuple[int, int]
    scale: tuple[float, float]
    pad: tuple[int, int]

    def file_pixel(self, row: float, column: float) -> tuple[float, float]:
        """Position in the upright file's pixels of a position in the standard picture; centres are whole numbers."""
        (top, left), (tall, wide), (above, beside) = self.crop, self.scale, self.pad
        return (row - above + 0.5) * tall - 0.5 + top, (column - beside + 0.5) * wide - 0.5 + left

    def standard_pixel(self, row: float, column: float) -> tuple[float, float]:
        """The inverse of `file_pixel`."""
        (top, left), (tall, wide), (above, beside) = self.crop, self.scale, self.pad
        return (row - top + 0.5) / tall - 0.5 + above, (column - left + 0.5) / wide - 0.5 + beside


def content_box(pixels: np.ndarray) -> tuple[int, int, int, int]:
    """The part of a picture inside its borders, as (top, bottom, left, right), ends exclusive.

    Lines at an edge are border while they are constant and black or white throughout: the shutter of collimation,
    padding, air beside the patient. Lines of anatomy vary. Tilted shutters stay.

    Args:
        pixels: (H, W), any unit.

    Raises:
        InputError: nothing remains.
    """
    step = max(1, min(pixels.shape) // 512)  # some 300,000 pixels tell the range as well as all
    low, high = np.percentile(pixels[::step, ::step], (0.5, 99.5))
    top, bottom, left, right = 0, pixels.shape[0], 0, pixels.shape[1]
    for _ in range(2):  # rows look different once side borders are off
        top, bottom = _trim(pixels[:, left:right], top, bottom, low, high)
        left, right = _trim(pixels[top:bottom].T, left, right, low, high)
    if min(bottom - top, right - left) < MIN_SIDE:
        raise InputError(f"nothing but borders ({right - left}×{bottom - top} pixels of content): give a radiograph")
    return top, bottom, left, right


def fit_square(
    pixels: np.ndarray, size: int, box: tuple[int, int, int, int], pixel_aspect: float = 1.0
) -> tuple[np.ndarray, Placement]:
    """Scale the content so that its longer side has ``size`` pixels, its aspect ratio in mm kept; anti-aliased.

    Classifiers of the field crop the centre instead (TorchXRayVision's XRayCenterCrop; RAD-DINO); here a volume is to
    be made from the picture, and a crop would cut the costophrenic angles or the apices, so the rest is padding.

    Args:
        pixels: (rows, columns).
        size: of the result's longer side.
        box: top, bottom, left and right of the content.
        pixel_aspect: height over width of a pixel.

    Returns:
        float32 (h, w) not yet padded, the larger of them ``size``, and where it comes from and goes to.
    """
    top, bottom, left, right = box
    height, width = bottom - top, right - left
    lengths = height * pixel_aspect, float(width)
    new_height, new_width = (max(1, round(length * size / max(lengths))) for length in lengths)
    content = np.ascontiguousarray(pixels[top:bottom, left:right], dtype=np.float32)
    # Pillow widens its triangle with the factor, so that nothing is skipped; in mode F nothing is rounded
    scaled = Image.fromarray(content).resize((new_width, new_height), Image.Resampling.BILINEAR)
    pad = (size - new_height) // 2, (size - new_width) // 2
    return np.asarray(scaled), Placement((top, left), (height / new_height, width / new_width), pad)


def landmarks(pixels: np.ndarray) -> np.ndarray:
    """The percentiles (11,) of the middle of a picture, in its unit.

    Raises:
        InputError: the picture is constant.
    """
    height, width = pixels.shape
    above, beside = (int((1 - _MIDDLE) / 2 * length) for length in (height, width))
    places = np.percentile(pixels[above : height - above, beside : width - beside], LANDMARK_PERCENTILES)
    if not places[-1] > places[0]:
        raise InputError("the picture is constant: export it again")
    return places


def standardise(pixels: np.ndarray) -> np.ndarray:
    """Bring the histogram of a picture to the standard one; float32 in [0, 1], same shape.

    What is darker than the first landmark runs to 0, what is brighter than the last to 1.

    Raises:
        InputError: the picture is constant.
    """
    places, where = landmarks(pixels), np.array(STANDARD_LANDMARKS)
    low, high = float(pixels.min()), float(pixels.max())
    # a picture of few grey levels has equal percentiles: one place, the mean of theirs
    distinct, index = np.unique(places, return_inverse=True)
    where = np.bincount(index, weights=where) / np.bincount(index)
    if low < distinct[0]:
        distinct, where = np.concatenate([[low], distinct]), np.concatenate([[0.0], where])
    if high > distinct[-1]:
        distinct, where = np.concatenate([distinct, [high]]), np.concatenate([where, [1.0]])
    return np.interp(pixels, distinct, where).astype(np.float32)


def pad_square(image: np.ndarray, size: int, placement: Placement) -> np.ndarray:
    """Put a picture (h, w) into the middle of black (size, size)."""
    square = np.zeros((size, size), dtype=np.float32)
    (above, beside), (height, width) = placement.pad, image.shape
    square[above : above + height, beside : beside + width] = image
    return square


def _trim(lines: np.ndarray, first: int, last: int, low: float, high: float) -> tuple[int, int]:
    """Move ``first`` and ``last`` inwards over lines (the rows of ``lines``) that are border."""
    while first < last and _is_border(lines[first], low, high):
        first += 1
    while first < last and _is_border(lines[last - 1], low, high):
        last -= 1
    return first, last


def _is_border(line: np.ndarray, low: float, high: float) -> bool:
    darkest, middle, brightest = np.percentile(line, (_MARKER_PERCENT, 50, 100 - _MARKER_PERCENT))
    margin = _BORDER_EXTREME * (high - low)
    extreme = middle <= low + margin or middle >= high - margin
    return bool(extreme and brightest - darkest <= _BORDER_VARIATION * (high - low))
