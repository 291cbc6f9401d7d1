"""Whose volume is it? Oracles that know the patient, a mean that knows nobody, and a swap of two patients."""

import functools

import numpy as np
import pytest

from dataset.intensity import HUWindow
from dataset.phantom import make_phantom
from errors import InputError
from evaluation.metrics.retrieval import THUMBNAIL_DHW, add_retrieval, retrieval_ranks, thumbnail

WINDOW = HUWindow()


@functools.cache
def small(seed):
    return thumbnail(make_phantom(seed, (20, 40, 40), (17.0, 10.8, 10.8)).hu, WINDOW)


def test_a_thumbnail_is_the_mean_of_its_cells():
    hu = np.full((32, 48, 24), -1000.0)
    hu[:2, :2, 0] = 1000.0  # the cell [0, 0, 0] alone
    found = thumbnail(hu, WINDOW)
    assert found.shape == THUMBNAIL_DHW
    assert found[0, 0, 0] == pytest.approx(1.0)
    assert found.sum() == pytest.approx(1.0)
    assert thumbnail(np.zeros((8, 8, 8), np.int16), WINDOW) == pytest.approx(0.5)


def test_the_own_ct_is_found_among_all():
    truths = [small(seed) for seed in range(6)]
    noisy = [truth + np.random.default_rng(0).normal(0, 0.05, truth.shape) for truth in truths]
    assert retrieval_ranks(noisy, truths) == [1.0] * 6
    assert retrieval_ranks([noisy[1], noisy[0], *noisy[2:]], truths)[2:] == [1.0] * 4
    assert min(retrieval_ranks([noisy[1], noisy[0], *noisy[2:]], truths)[:2]) > 1
    mean = np.mean(truths, axis=0)
    assert sorted(retrieval_ranks([mean] * 6, truths)) == [1, 2, 3, 4, 5, 6]  # nearest to one of six
    assert retrieval_ranks([truths[0]] * 2, [truths[0]] * 2) == [1.5, 1.5]  # nobody can tell
    with pytest.raises(InputError, match="one CT for each"):
        retrieval_ranks(truths, truths[:2])


def test_reports_are_told_about_their_patients():
    reports = {name: {} for name in "abc"}
    pictures = {
        name: {"truth": small(seed), "right": small(seed), "shuffled": small((seed + 1) % 2)}
        for seed, name in enumerate("ab")
    }
    add_retrieval(reports, pictures)
    assert reports["a"]["retrieval"] == {"nearest": 1.0, "nearest_shuffled": 0.0, "rank": 1.0}
    assert reports["c"] == {}
    alone = {"a": {}}
    add_retrieval(alone, pictures)
    assert alone == {"a": {}}
