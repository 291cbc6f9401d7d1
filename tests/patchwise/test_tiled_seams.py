"""The seam ratio: 1 without seams, by hand with them, and blind to anatomy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dataset.tiling import HaloTiling, Tiling
from errors import InputError
from evaluation.metrics.seams import PlaneErrors, seam_ratio

TILING = Tiling((40, 40, 40), (20, 20, 20), 0.0, (2, 2, 2))


def test_borders_are_the_faces_inside_the_volume() -> None:
    assert TILING.borders == ((20,), (20,), (20,))
    assert Tiling((604, 512, 512), (128, 256, 256), 0.25).borders[1] == (192, 256, 448)
    # what is padded has no face to show
    assert Tiling((18, 40, 16), (16, 20, 16), 0.0, (4, 1, 1)).borders == ((4, 16), (20,), ())
    assert HaloTiling((30, 9, 9), (16, 9, 9), (4, 0, 0)).borders == ((12, 18), (), ())


def test_even_error_gives_one() -> None:
    original = np.random.default_rng(0).normal(size=TILING.shape_dhw).astype(np.float32)
    assert seam_ratio(original + 3, original, TILING) == pytest.approx(1, rel=1e-5)
    assert seam_ratio(original, original, TILING) == 1
    assert seam_ratio(original + 3, original, Tiling((40, 40, 40), (40, 40, 40))) == 1


def test_a_seam_by_hand_and_int16() -> None:
    original = np.zeros(TILING.shape_dhw, np.int16)
    reconstruction = original + np.int16(2)
    reconstruction[19:21] = 6  # both planes at the face along D, three times the error
    # along H and W the thick planes add alike to faces and to the inside: 2 of 40 slices with 6 instead of 2
    plain, seam = 2 * 1600 * 2, 2 * 1600 * 6
    across = 2 * 40 * (38 * 2 + 2 * 6)
    assert seam_ratio(reconstruction, original, TILING) == pytest.approx((seam + 2 * across) / (plain + 2 * across))
    only = original.copy()
    only[20, 0, 0] = 1
    assert seam_ratio(only, original, TILING) == math.inf


def test_anatomy_that_changes_evenly_is_no_seam() -> None:
    """Errors that grow towards the middle of the body are not taken for seams, which lie there too."""
    original = np.zeros((64, 64, 64), np.float32)
    line = np.sin(np.pi * (np.arange(64) + 0.5) / 64).astype(np.float32)
    error = line[:, None, None] * line[:, None] * line
    ratio = seam_ratio(original + error, original, Tiling((64, 64, 64), (32, 32, 32), 0.0, (4, 4, 4)))
    assert 1 <= ratio < 1.1


@pytest.mark.parametrize("tiling", [TILING, Tiling((40, 40, 40), (16, 20, 24), 0.25, (2, 2, 2))])
def test_slices_one_after_the_other_give_the_ratio_of_the_volume(tiling: Tiling) -> None:
    rng = np.random.default_rng(0)
    original, noisy = (rng.integers(-1000, 1000, tiling.shape_dhw).astype(np.int16) for _ in range(2))
    errors = PlaneErrors(tiling.shape_dhw)
    for first in (0, 7, 30):
        last = {0: 7, 7: 30, 30: 40}[first]
        errors.update(noisy[first:last], original[first:last], first)
    assert errors.seam_ratio(tiling) == seam_ratio(noisy, original, tiling)
    planes = np.abs(noisy.astype(int) - original).sum((0, 2))
    assert errors.at(1, 12) == planes[11] + planes[12]


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="one shape"):
        seam_ratio(np.zeros((4, 4, 4)), np.zeros((4, 4, 5)), TILING)
