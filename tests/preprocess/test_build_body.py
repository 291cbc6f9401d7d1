"""Body statistics: exact on boxes, close to the truth of a phantom."""

from __future__ import annotations

import numpy as np
import pytest

from dataset.phantom import make_phantom
from preprocess.build_body import body_statistics


def test_body_of_a_box_with_holes():
    hu = np.full((20, 30, 40), -1000, np.int16)
    hu[3:17, 5:25, 8:32] = 40
    hu[5:15, 10:20, 10:16] = hu[5:15, 10:20, 24:30] = -850  # lungs
    hu[0:2, 0:2, 0:2] = 200  # a table
    body = body_statistics(hu, (3.0, 3.0, 3.0))
    assert body["bounding_box_vox"] == [[3, 5, 8], [17, 25, 32]]
    assert body["share_body"] == round(14 * 20 * 24 / hu.size, 6)
    assert body["share_lung"] == round(2 * 10 * 10 * 6 / hu.size, 6)
    assert body["share_tissue"] == pytest.approx(body["share_body"] - body["share_lung"], abs=1e-6)
    assert body["share_air"] == pytest.approx(1 - body["share_body"], abs=1e-6)
    assert body["hu_percentiles"] == {"1": -850, "5": -850, "25": 40, "50": 40, "75": 40, "95": 40, "99": 40}


def test_body_box_covers_the_body_on_a_fine_grid():
    hu = np.full((40, 300, 300), -1000, np.int16)
    hu[7:33, 101:233, 50:251] = 40
    low, high = body_statistics(hu, (2.5, 0.7, 0.7))["bounding_box_vox"]
    assert np.all(np.array(low) <= [7, 101, 50])
    assert np.all(np.array(high) >= [33, 233, 251])
    assert np.all(np.array([7, 101, 50]) - low <= 4)
    assert np.all(np.array(high) - [33, 233, 251] <= 4)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 4, 5), (1, 64, 64)])
def test_a_volume_without_a_body(shape):
    body = body_statistics(np.full(shape, -1000, np.int16), (1.0, 1.0, 1.0))
    assert body["bounding_box_vox"] == [[0, 0, 0], list(shape)]
    assert (body["share_body"], body["share_air"], body["hu_percentiles"]) == (0, 1, {})
    full = body_statistics(np.full(shape, 40, np.int16), (1.0, 1.0, 1.0))
    assert (full["bounding_box_vox"], full["share_tissue"]) == ([[0, 0, 0], list(shape)], 1)


def test_the_body_of_a_phantom():
    phantom = make_phantom(3, (64, 96, 96))
    body = body_statistics(phantom.hu, phantom.spacing_mm)
    assert body["share_body"] == pytest.approx(phantom.body_mask.mean(), abs=0.02)
    assert body["share_lung"] == pytest.approx(phantom.mask("lungs").mean(), abs=0.03)
