"""How sure is a Fréchet distance? A bootstrap over patients, each resampled together with the volume drawn for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from evaluation.metrics.frechet import PLANES, frechet_of_planes


def frechet_draws(
    real: Sequence[Mapping[str, np.ndarray]],
    generated: Sequence[Mapping[str, np.ndarray]],
    planes: Sequence[str] = PLANES,
    *,
    resamples: int = 200,
    seed: int = 0,
) -> np.ndarray:
    """Distances ``frechet`` (resamples,) of resampled patients, each with the own generated volume.

    For one cohort, number and seed the same patients are drawn, so that draws of two samplers are paired.

    Args:
        real: features, one entry a patient, see `frechet_of_planes`.
        generated: of the same patients.
        planes: names of the features.
        resamples: how many.
        seed: of the resampling.
    """
    count, rng = len(real), np.random.default_rng(seed)
    return np.array(
        [
            frechet_of_planes([real[i] for i in chosen], [generated[i] for i in chosen], planes)["frechet"]
            for chosen in (rng.integers(0, count, count) for _ in range(resamples))
        ]
    )


def centred_interval(estimate: float, draws: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of positive draws, scaled so that their mean is the estimate; NaN without draws.

    A cohort with patients drawn twice is less diverse than the cohort itself, so that draws lie above its distance.
    """
    if not draws.size or not draws.mean() > 0:
        return math.nan, math.nan
    low, high = np.quantile(draws, [0.025, 0.975]) * (estimate / draws.mean())
    return float(low), float(high)
