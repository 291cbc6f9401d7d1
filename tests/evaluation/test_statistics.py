"""Intervals and tests against answers that are known: pair counting, closed forms, and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import InputError
from evaluation.metrics.statistics import Interval, auroc, auroc_interval, bootstrap, brier, delong

SCORES = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=30)


def by_pairs(scores, labels):
    """AUROC by counting all pairs of a positive and a negative."""
    wins = [
        1.0 if p > n else 0.5 if p == n else 0.0
        for p, n in itertools.product(
            [s for s, y in zip(scores, labels, strict=True) if y],
            [s for s, y in zip(scores, labels, strict=True) if not y],
        )
    ]
    return sum(wins) / len(wins) if wins else math.nan


def delong_by_pairs(first, second, labels):
    """Difference and variance straight from DeLong's equations, with every pair formed."""
    y = np.asarray(labels, dtype=bool)
    components = []
    for scores in (np.asarray(first, dtype=float), np.asarray(second, dtype=float)):
        psi = (scores[y][:, None] > scores[~y]) + 0.5 * (scores[y][:, None] == scores[~y])
        components.append((psi.mean(axis=1), psi.mean(axis=0), psi.mean()))
    (v10_a, v01_a, a), (v10_b, v01_b, b) = components
    return a - b, np.var(v10_a - v10_b, ddof=1) / y.sum() + np.var(v01_a - v01_b, ddof=1) / (~y).sum()


@settings(max_examples=100, deadline=None)
@given(cases=SCORES)
def test_auroc_counts_pairs(cases):
    scores, labels = zip(*cases, strict=True)
    np.testing.assert_allclose(auroc(scores, labels), by_pairs(scores, labels))


def test_auroc_of_known_orders():
    assert auroc([1, 2, 3, 4], [0, 0, 1, 1]) == 1
    assert auroc([1, 2, 3, 4], [1, 1, 0, 0]) == 0
    assert auroc([5, 5, 5, 5], [1, 0, 1, 0]) == 0.5
    assert auroc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == 0.75
    assert math.isnan(auroc([1, 2], [1, 1]))


@settings(max_examples=100, deadline=None)
@given(cases=SCORES)
def test_auroc_depends_on_order_alone_and_mirrors(cases):
    scores, labels = (np.array(column) for column in zip(*cases, strict=True))
    area = auroc(scores, labels)
    np.testing.assert_allclose(auroc(np.exp(scores), labels), area)
    np.testing.assert_allclose(auroc(-scores, labels), 1 - area)
    np.testing.assert_allclose(auroc(scores, ~labels), 1 - area)


def test_auroc_of_two_normals_is_known():
    """Φ(d / √2) for unit normals d apart."""
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.normal(0, 1, 20000), rng.normal(1, 1, 20000)])
    assert auroc(scores, np.arange(40000) >= 20000) == pytest.approx(0.5 * (1 + math.erf(0.5)), abs=0.006)


def test_the_bootstrap_of_a_mean_has_the_width_of_the_theory():
    values = np.random.default_rng(1).normal(3, 2, 400)
    interval = bootstrap(values, resamples=4000)
    assert interval.estimate == values.mean()
    reach = 1.96 * values.std() / 20
    assert interval.low == pytest.approx(values.mean() - reach, abs=0.1 * reach)
    assert interval.high == pytest.approx(values.mean() + reach, abs=0.1 * reach)
    narrow = bootstrap(values, level=0.5)
    assert interval.low < narrow.low < narrow.high < interval.high


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(2)
    inside = 0
    for trial in range(200):
        low, high = bootstrap(rng.exponential(1, 60), resamples=200, seed=trial)[1:]
        inside += low <= 1 <= high
    assert 0.87 <= inside / 200 <= 0.99


def test_patients_are_drawn_together():
    """A paired difference that is constant has no spread, however much the patients differ."""
    first = np.random.default_rng(3).normal(0, 10, 50)
    interval = bootstrap(first + 2, first, statistic=lambda a, b: float(np.mean(a - b)))
    assert interval.low == pytest.approx(2)
    assert interval.high == pytest.approx(2)


def test_rows_of_a_matrix_are_patients():
    rows = np.arange(12.0).reshape(6, 2)
    interval = bootstrap(rows, statistic=lambda x: float(x[:, 1].mean() - x[:, 0].mean()))
    np.testing.assert_allclose(interval, (1, 1, 1))


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(9).random(30)
    assert bootstrap(values, seed=1) == bootstrap(values, seed=1)
    assert bootstrap(values, seed=1) != bootstrap(values, seed=2)
    assert bootstrap([4.0]) == Interval(4, 4, 4)
    assert str(Interval(0.5, 0.25, 0.75)) == "0.5 [0.25, 0.75]"


def test_resamples_without_an_answer_are_left_out():
    interval = auroc_interval([1, 2, 3, 4], [0, 0, 0, 1])  # a third of all resamples has no positive
    assert interval.estimate == 1
    assert (interval.low, interval.high) == (1, 1)
    none = auroc_interval([1, 2], [1, 1])
    assert all(math.isnan(value) for value in none)


def test_the_interval_of_an_auroc_agrees_with_the_theory():
    """Hanley and McNeil 1982: the standard error for exponential scores of area A."""
    rng = np.random.default_rng(4)
    n = 150
    scores = np.concatenate([rng.exponential(1, n), rng.exponential(3, n)])  # area 3 / (1 + 3)
    interval = auroc_interval(scores, np.arange(2 * n) >= n)
    a = interval.estimate
    assert a == pytest.approx(0.75, abs=0.06)
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    error = math.sqrt((a * (1 - a) + (n - 1) * (q1 - a * a + q2 - a * a)) / n**2)
    assert (interval.high - interval.low) / 2 == pytest.approx(1.96 * error, rel=0.15)


@settings(max_examples=100, deadline=None)
@given(
    cases=st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=4, max_size=30),
    data=st.data(),
)
def test_delong_is_its_equations(cases, data):
    positives = data.draw(st.integers(2, len(cases) - 2))
    labels = [i < positives for i in range(len(cases))]
    first, second = zip(*cases, strict=True)
    result = delong(first, second, labels)
    difference, variance = delong_by_pairs(first, second, labels)
    assert result.first == pytest.approx(by_pairs(first, labels))
    assert result.second == pytest.approx(by_pairs(second, labels))
    assert result.difference.estimate == pytest.approx(difference, abs=1e-12)
    if variance > 1e-12:
        assert result.difference.high - difference == pytest.approx(1.959964 * math.sqrt(variance))
        assert result.p_value == pytest.approx(math.erfc(abs(difference) / math.sqrt(2 * variance)), abs=1e-9)
    swapped = delong(second, first, labels)
    assert swapped.p_value == pytest.approx(result.p_value)
    assert swapped.difference.estimate == pytest.approx(-result.difference.estimate)


def test_delong_of_a_case_worked_out_by_hand():
    """Three positives, two negatives. First: V10 = (1, 1, ½), V01 = (1, ⅔), A = ⅚; second: (½, 1, 1), (⅔, 1), ⅚.

    The areas are equal; the differences of the components are (½, 0, -½) and (⅓, -⅓), of variance ¼ and 2/9, so that
    Var = ¼ / 3 + 2/9 / 2 = 7/36.
    """
    labels = [1, 1, 1, 0, 0]
    result = delong([5, 4, 2, 1, 3], [2, 5, 4, 3, 1], labels)
    assert (result.first, result.second) == (pytest.approx(5 / 6), pytest.approx(5 / 6))
    assert result.difference.high == pytest.approx(1.959964 * math.sqrt(7 / 36))
    assert result.p_value == pytest.approx(1.0)


def test_brier_score_of_known_predictions():
    assert brier([0, 0, 0], [1, 0, 1]) == pytest.approx(0.25)
    assert brier([100, -100], [1, 0]) == pytest.approx(0)
    assert brier([1000, -1000], [0, 1]) == pytest.approx(1)
    assert brier([math.log(3)], [1]) == pytest.approx(1 / 16)
    with pytest.raises(InputError, match="2 scores, 3 labels"):
        brier([1, 2], [0, 1, 1])


def paired_scores(rng, n, gain_first, gain_second):
    labels = np.arange(n) % 2 == 1
    shared = rng.normal(0, 1, n)
    return (
        gain_first * labels + shared + rng.normal(0, 0.7, n),
        gain_second * labels + shared + rng.normal(0, 0.7, n),
        labels,
    )


def test_delong_agrees_with_the_bootstrap_and_with_permutation():
    rng = np.random.default_rng(5)
    first, second, labels = paired_scores(rng, 160, 1.4, 0.9)
    result = delong(first, second, labels)
    resampled = bootstrap(first, second, labels, statistic=lambda a, b, y: auroc(a, y > 0.5) - auroc(b, y > 0.5))
    assert result.difference.low == pytest.approx(resampled.low, abs=0.02)
    assert result.difference.high == pytest.approx(resampled.high, abs=0.02)
    # under the hypothesis the two scores of a case may be exchanged; ranks, since both are on one scale
    exchanged = []
    for _ in range(1000):
        swap = rng.random(len(labels)) < 0.5
        exchanged.append(auroc(np.where(swap, second, first), labels) - auroc(np.where(swap, first, second), labels))
    p_value = np.mean(np.abs(exchanged) >= abs(result.difference.estimate) - 1e-12)
    assert result.p_value == pytest.approx(p_value, abs=0.03)


def test_delong_is_wrong_in_five_of_a_hundred():
    rng = np.random.default_rng(6)
    p_values = [delong(*paired_scores(rng, 80, 1.0, 1.0)).p_value for _ in range(400)]
    assert 0.02 <= np.mean(np.array(p_values) < 0.05) <= 0.085
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.06)


def test_delong_of_equal_and_of_perfect_scores():
    labels = [0, 0, 1, 1]
    same = delong([1, 3, 2, 4], [10, 30, 20, 40], labels)
    assert (same.difference.estimate, same.p_value) == (0, 1)
    apart = delong([1, 2, 3, 4], [4, 3, 2, 1], labels)
    assert (apart.first, apart.second, apart.p_value) == (1, 0, 0)


def test_what_cannot_be_computed_is_refused():
    with pytest.raises(InputError, match="not 0"):
        bootstrap([])
    with pytest.raises(InputError, match="2, 3"):
        bootstrap([1, 2], [1, 2, 3])
    with pytest.raises(InputError, match="1 positive and 2 negative"):
        delong([1, 2, 3], [1, 2, 3], [1, 0, 0])
    with pytest.raises(InputError, match="3 scores, 4 labels"):
        delong([1, 2, 3], [1, 2, 3], [1, 0, 0, 1])
    with pytest.raises(InputError, match="2 scores, 3 labels"):
        auroc([1, 2], [0, 1, 1])
