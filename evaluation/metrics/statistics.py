"""Intervals and tests for figures over few patients: bootstrap, AUROC, DeLong's test of two of them, Brier score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import special, stats

from errors import InputError

_RESAMPLES = 2000


class Interval(NamedTuple):
    """An estimate with the limits of its confidence interval."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.estimate:.4g} [{self.low:.4g}, {self.high:.4g}]"


def bootstrap(
    *samples: Sequence[float] | np.ndarray,
    statistic: Callable[..., float] = np.mean,
    level: float = 0.95,
    resamples: int = _RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap over patients (Efron 1979, https://doi.org/10.1214/aos/1176344552).

    Args:
        samples: one or several sequences of equal length n; entry i of each belongs to patient i, and patients are
            drawn together. A row of an array with more axes is one patient.
        statistic: of the resampled sequences; non-finite results (a correlation of constants) are left out.
        level: of confidence.
        resamples: how many.
        seed: the same seed gives the same interval.

    Returns:
        The statistic of the samples themselves and the limits; all equal where there is one patient.

    Raises:
        InputError: no patients, or sequences of different lengths.
    """
    arrays = [np.asarray(sample, dtype=np.float64) for sample in samples]
    n = len(arrays[0]) if arrays else 0
    if n == 0 or any(len(array) != n for array in arrays):
        raise InputError(f"bootstrap over {[len(array) for array in arrays]} patients: equal numbers are needed, not 0")
    estimate = float(statistic(*arrays))
    rng = np.random.default_rng(seed)
    drawn = np.array(
        [statistic(*(array[index] for array in arrays)) for index in (rng.integers(0, n, n) for _ in range(resamples))],
        dtype=np.float64,
    )
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return Interval(estimate, float("nan"), float("nan"))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high))


def auroc(scores: Sequence[float] | np.ndarray, labels: Sequence[bool] | np.ndarray) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties count half; NaN without both.

    Args:
        scores: (n,), higher means more likely positive.
        labels: (n,) bool.

    Raises:
        InputError: another number of labels than of scores.
    """
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=bool)
    _require_as_many(scores, labels)
    positives, negatives = int(labels.sum()), int((~labels).sum())
    if not positives or not negatives:
        return float("nan")
    ranks = stats.rankdata(scores)
    return float((ranks[labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def auroc_interval(
    scores: Sequence[float] | np.ndarray,
    labels: Sequence[bool] | np.ndarray,
    *,
    resamples: int = _RESAMPLES,
    seed: int = 0,
) -> Interval:
    """AUROC with a 95 % bootstrap interval over patients."""
    known = np.asarray(labels, dtype=np.float64)
    return bootstrap(scores, known, statistic=lambda s, y: auroc(s, y > 0.5), resamples=resamples, seed=seed)


def brier(log_odds: Sequence[float] | np.ndarray, labels: Sequence[bool] | np.ndarray) -> float:
    """Mean squared error of predicted probabilities (Brier 1950); p(1-p) for who always says the prevalence p.

    Args:
        log_odds: (n,).
        labels: (n,) bool.

    Raises:
        InputError: another number of labels than of scores.
    """
    log_odds, labels = np.asarray(log_odds, dtype=np.float64), np.asarray(labels, dtype=bool)
    _require_as_many(log_odds, labels)
    return float(np.mean((special.expit(log_odds) - labels) ** 2))


@dataclass(frozen=True)
class DeLong:
    """Two AUROCs on the same cases.

    Attributes:
        first: AUROC of the first scores.
        second: of the second.
        difference: first - second with its 95 % interval.
        p_value: two-sided, of the hypothesis that they are equal.
    """

    first: float
    second: float
    difference: Interval
    p_value: float


def delong(
    first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray, labels: Sequence[bool] | np.ndarray
) -> DeLong:
    """Paired test of two AUROCs (DeLong et al. 1988, https://doi.org/10.2307/2531595).

    Args:
        first: (n,) scores.
        second: (n,) scores of the same cases.
        labels: (n,) bool.

    Raises:
        InputError: fewer than two positives or negatives, where no variance can be estimated, or another number of
            labels than of scores.
    """
    labels = np.asarray(labels, dtype=bool)
    for scores in (first, second):
        _require_as_many(scores, labels)
    if labels.sum() < 2 or (~labels).sum() < 2:
        raise InputError(
            f"DeLong's test of {int(labels.sum())} positive and {int((~labels).sum())} negative cases: at least two of "
            "each are needed"
        )
    areas, by_positive, by_negative = [], [], []
    for scores in (np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)):
        # mid-ranks give each case's share of pairs won without forming all pairs (Sun and Xu 2014)
        positives, negatives = scores[labels], scores[~labels]
        ranks = stats.rankdata(np.concatenate([positives, negatives]))
        m, n = len(positives), len(negatives)
        by_positive.append((ranks[:m] - stats.rankdata(positives)) / n)
        by_negative.append(1 - (ranks[m:] - stats.rankdata(negatives)) / m)
        areas.append(float(by_positive[-1].mean()))
    covariance = np.cov(by_positive) / labels.sum() + np.cov(by_negative) / (~labels).sum()
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    difference = areas[0] - areas[1]
    if variance <= 1e-15:  # the same ranking, or both perfect
        return DeLong(areas[0], areas[1], Interval(difference, difference, difference), 1.0 if difference == 0 else 0.0)
    error = variance**0.5
    reach = float(stats.norm.ppf(0.975)) * error
    p_value = float(2 * stats.norm.sf(abs(difference) / error))
    return DeLong(areas[0], areas[1], Interval(difference, difference - reach, difference + reach), p_value)


def _require_as_many(scores: Sequence[float] | np.ndarray, labels: np.ndarray) -> None:
    if len(scores) != len(labels):
        raise InputError(f"{len(scores)} scores, {len(labels)} labels: give one label for each score")
