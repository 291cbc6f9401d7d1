"""The linear control: ridge regression in the dual against its textbook form, and against leaving patients out."""

from __future__ import annotations

import numpy as np
import pytest

from errors import InputError
from evaluation.metrics.linear import RidgeWeights


def data(count: int = 12, pixels: int = 30, voxels: int = 7, noise: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    pictures = rng.normal(2.0, 1.0, (count, pixels))
    return pictures, pictures @ rng.normal(size=(pixels, voxels)) + 5.0 + noise * rng.normal(size=(count, voxels))


def ridge(pictures: np.ndarray, targets: np.ndarray, penalty: float, picture: np.ndarray) -> np.ndarray:
    """In the primal, with an intercept that is not penalised."""
    x, y = pictures - pictures.mean(0), targets - targets.mean(0)
    slope = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y)
    return targets.mean(0) + (picture - pictures.mean(0)) @ slope


def test_weights_of_volumes_are_ridge_regression():
    pictures, targets = data()
    weights = RidgeWeights(pictures, targets)
    new = np.random.default_rng(1).normal(size=pictures.shape[1])
    assert weights(new).sum() == pytest.approx(1.0)
    np.testing.assert_allclose(weights(new) @ targets, ridge(pictures, targets, weights.penalty, new), rtol=1e-8)


def test_the_penalty_is_chosen_by_leaving_each_patient_out():
    pictures, targets = data()
    weights = RidgeWeights(pictures, targets)
    for penalty, error in weights.loo_errors.items():
        if penalty < 1e-3:  # the primal has no accurate inverse there
            continue
        left_out = [
            ridge(np.delete(pictures, i, 0), np.delete(targets, i, 0), penalty, pictures[i]) - targets[i]
            for i in range(len(pictures))
        ]
        assert error == pytest.approx(np.mean(np.square(left_out)), rel=1e-6)
    assert weights.loo_errors[weights.penalty] == min(weights.loo_errors.values())


def test_what_is_linear_is_learnt_and_what_is_chance_is_shrunk_to_the_mean():
    pictures, targets = data(count=40, pixels=5, noise=0.0)
    weights = RidgeWeights(pictures[:30], targets[:30])
    error = np.stack([weights(picture) @ targets[:30] for picture in pictures[30:]]) - targets[30:]
    assert np.abs(error).max() < 1e-3 * targets.std()
    chance = np.random.default_rng(2).normal(size=targets.shape)
    blind = RidgeWeights(pictures, chance)
    assert np.abs(blind(pictures[0]) - 1 / 40).max() < 0.03
    same = RidgeWeights(np.ones((4, 3)), targets[:4])  # pictures that say nothing
    np.testing.assert_allclose(same(np.zeros(3)), 0.25)


def test_two_patients_are_too_few():
    with pytest.raises(InputError, match="three"):
        RidgeWeights(np.zeros((2, 3)), np.zeros((2, 3)))
