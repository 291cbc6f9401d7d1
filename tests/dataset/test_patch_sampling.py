"""Where patches are taken: keyed, biased towards the body by the share that was asked for, and never mirrored."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.body import body_metadata
from dataset.patch_sampling import random_start, read_body
from dataset.phantom import make_phantom
from errors import InputError
from tests.dataset.test_body import AFFINE, ellipse


@pytest.mark.parametrize("bias", [0.0, 0.5, 1.0])
def test_the_share_of_centres_in_the_body(bias: float) -> None:
    hu, mask = ellipse()
    body = read_body({"body": body_metadata(hu, AFFINE)}, hu.shape)
    patch = (2, 2, 2)  # so small that no centre is moved back inside
    hits = []
    for index in range(1500):
        start = random_start(hu.shape, patch, np.random.default_rng((0, 0, index)), body, bias)
        hits.append(mask[tuple(a + 1 for a in start)])
    expected = bias + (1 - bias) * mask.mean()
    assert abs(np.mean(hits) - expected) < 0.06


def test_without_bias_the_body_changes_nothing() -> None:
    hu, _ = ellipse()
    body = read_body({"body": body_metadata(hu, AFFINE)}, hu.shape)
    for index in range(20):
        a = random_start(hu.shape, (8, 8, 8), np.random.default_rng(index), body, 0.0)
        assert a == random_start(hu.shape, (8, 8, 8), np.random.default_rng(index))


SIZES = st.tuples(*[st.integers(1, 30)] * 3)


@settings(deadline=None, max_examples=200)
@given(SIZES, SIZES, st.integers(0, 1000), st.sampled_from([0.0, 0.5, 1.0]), st.booleans())
def test_patches_lie_inside_or_are_centred(
    shape: tuple[int, int, int], patch: tuple[int, int, int], seed: int, bias: float, box: bool
) -> None:
    hu = np.full(shape, 40, np.int16)
    entry = body_metadata(hu, AFFINE)
    if box:
        del entry["map"]
    body = read_body({"body": entry}, shape)
    starts = [random_start(shape, patch, np.random.default_rng(seed), body, bias) for _ in range(2)]
    assert starts[0] == starts[1]
    for start, size, length in zip(starts[0], shape, patch, strict=True):
        assert 0 <= start <= size - length if size > length else start == (size - length) // 2


def test_a_bounding_box_alone_is_enough() -> None:
    body = read_body({"body": {"bounding_box_vox": [[2, 3, 4], [5, 6, 9]], "more": 1}}, (10, 10, 10))
    assert body is not None
    rng = np.random.default_rng(0)
    centres = np.array([body.draw(rng) for _ in range(400)])
    assert centres.min(axis=0).tolist() == [2, 3, 4]
    assert centres.max(axis=0).tolist() == [4, 5, 8]
    assert read_body({}, (10, 10, 10)) is None


@pytest.mark.parametrize(
    "entry",
    [
        {},
        [],
        {"bounding_box_vox": [[0, 0, 0], [11, 5, 5]]},
        {"bounding_box_vox": [[3, 0, 0], [3, 5, 5]]},
        {"bounding_box_vox": "everywhere"},
        {"map": {"cells": [9, 9, 9], "cell_vox": [1, 1, 1], "bits": ""}},
        {"map": {"cells": [10, 10, 10], "cell_vox": [1, 1, 1], "bits": "AAAA"}},
        {"map": {"cells": [10, 10, 10], "cell_vox": [0, 1, 1], "bits": ""}},
    ],
)
def test_a_body_that_does_not_fit_is_refused(entry: object) -> None:
    with pytest.raises(InputError, match="body"):
        read_body({"body": entry}, (10, 10, 10))


def test_centres_on_a_phantom_are_under_the_skin() -> None:
    phantom = make_phantom(0, (32, 64, 64))
    body = read_body({"body": body_metadata(phantom.hu, phantom.affine)}, phantom.hu.shape)
    assert body is not None
    rng = np.random.default_rng(0)
    inside = np.mean([phantom.body_mask[body.draw(rng)] for _ in range(500)])
    assert inside > 0.95
    assert inside > phantom.body_mask.mean() + 0.2
