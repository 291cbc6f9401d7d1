"""Ridge regression from a radiograph to the volume: what a linear map knows, as a control of a generative model.

Hoerl & Kennard 1970, https://doi.org/10.1080/00401706.1970.10488634, in the dual, since there are far fewer patients
than pixels: with centred pictures X and volumes Y of N training patients and K = X·Xᵀ, a picture x becomes
mean(Y) + x·Xᵀ·(K + λI)⁻¹·Y. That is a weighted sum of training volumes, so that only the weights are computed here, and
no matrix of all voxels is held.
"""

from __future__ import annotations

import numpy as np

from errors import InputError

# Candidates for λ, in units of the mean eigenvalue of K.
_PENALTIES = tuple(10.0**exponent for exponent in np.arange(-6.0, 3.5, 0.5))


class RidgeWeights:
    """Weights of training volumes for a picture; the penalty is the best one in leave-one-out on the training set.

    Args:
        pictures: (N, P) of N training patients.
        targets: (N, M), some voxels of each volume, by which the penalty is chosen.

    Attributes:
        penalty: λ.
        loo_errors: mean squared leave-one-out error of ``targets`` for each candidate, in closed form:
            the residual of i over 1 - H[i, i], H the hat matrix with an intercept that is not penalised.

    Raises:
        InputError: fewer than three patients.
    """

    def __init__(self, pictures: np.ndarray, targets: np.ndarray) -> None:
        count = len(pictures)
        if count < 3:
            raise InputError(f"{count} training radiograph(s): a linear map needs three or more")
        self._mean = pictures.mean(0, dtype=np.float64)
        self._centred = pictures - self._mean
        outputs = targets - targets.mean(0, dtype=np.float64)
        values, vectors = np.linalg.eigh(self._centred @ self._centred.T)
        values = np.maximum(values, 0.0)
        rotated = vectors.T @ outputs  # (N, M)
        scale = float(values.mean()) or 1.0
        self.loo_errors: dict[float, float] = {}
        for candidate in _PENALTIES:
            shrunk = values / (values + candidate * scale)
            residual = outputs - vectors @ (shrunk[:, None] * rotated)
            left = 1.0 - 1.0 / count - np.square(vectors) @ shrunk  # (N,)
            self.loo_errors[candidate * scale] = float(np.mean(np.square(residual / left[:, None])))
        self.penalty = min(self.loo_errors, key=lambda penalty: self.loo_errors[penalty])
        self._inverse = (vectors / (values + self.penalty)) @ vectors.T

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """Picture (P,) -> weights (N,) of the training volumes, which sum to 1."""
        dual = self._inverse @ (self._centred @ (picture - self._mean))
        return dual - dual.mean() + 1.0 / len(dual)
