"""The report on generated volumes: oracles that know the truth, controls that do not, and a nearest neighbour."""

import functools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset.intensity import HUWindow
from dataset.phantom import make_phantom
from errors import ConfigurationError, InputError
from evaluation.metrics.generation import (
    case_report,
    derangement,
    masked_psnr,
    mean_volume,
    mirror_scores,
    pearson,
    summarise,
    volume_scores,
)
from evaluation.metrics.projection import mirror, radiograph

SIZE, SPACING = (20, 40, 40), (17.0, 10.8, 10.8)
WINDOW = HUWindow()


@functools.cache
def phantom(seed):
    return make_phantom(seed, SIZE, SPACING)


def in_window(hu):
    return np.clip(hu, WINDOW.min_hu, WINDOW.max_hu).astype(np.float32)


@given(st.integers(2, 200), st.integers(0, 100))
def test_nobody_keeps_the_own_radiograph(count, seed):
    order = derangement(count, seed)
    assert sorted(order) == list(range(count))
    assert all(order[i] != i for i in range(count))
    assert order == derangement(count, seed)


def test_one_case_cannot_be_shuffled():
    with pytest.raises(ConfigurationError, match="two or more"):
        derangement(1)


def test_psnr_under_a_mask():
    a, b = np.zeros((2, 2, 2)), np.zeros((2, 2, 2))
    b[0] = 0.1
    mask = np.zeros((2, 2, 2), bool)
    mask[0] = True
    assert masked_psnr(a, b, mask) == pytest.approx(20.0)
    assert masked_psnr(a, b, np.ones_like(mask)) == pytest.approx(20.0 + 10 * math.log10(2))
    assert masked_psnr(a, b, ~mask) == math.inf
    assert math.isnan(masked_psnr(a, b, mask & ~mask))


def test_scores_of_a_known_error():
    true = phantom(0)
    scores = volume_scores(
        in_window(true.hu) + 50.0, in_window(true.hu), true.body_mask, true.affine, HUWindow(-1100, 1100)
    )
    assert scores["mae_hu"] == pytest.approx(50.0, rel=1e-4)
    assert scores["mae_body_hu"] == pytest.approx(50.0, rel=1e-4)
    assert scores["bias_hu"] == pytest.approx(50.0, rel=1e-4)
    for convention in ("psnr_body_db", "psnr_db", "psnr_slice_db"):  # one error everywhere: they agree
        assert scores[convention] == pytest.approx(20 * math.log10(2200 / 50), rel=1e-4)
    assert scores["drr_ncc"] > 0.999


def test_the_mean_volume():
    volumes = [np.full((2, 3, 4), value, np.int16) for value in (10, 20, 60)]
    assert np.array_equal(mean_volume(iter(volumes)), np.full((2, 3, 4), 30.0))
    with pytest.raises(InputError, match="no training volumes"):
        mean_volume([])
    with pytest.raises(InputError, match="one size"):
        mean_volume([volumes[0], volumes[0][:1]])


def test_a_mirrored_volume_is_recognised():
    hu = phantom(0).hu
    follows, ignores = mirror_scores(hu, mirror(hu)), mirror_scores(hu, hu)
    assert follows["ncc_mirrored"] == pytest.approx(1.0)
    assert follows["gain"] > 0.02
    assert ignores["gain"] == pytest.approx(-follows["gain"])


def test_correlation_of_constants_is_nan():
    assert math.isnan(pearson(np.ones(5), np.arange(5.0)))
    assert math.isnan(pearson(np.arange(2.0), np.arange(2.0)))
    assert pearson(np.arange(5.0), -np.arange(5.0)) == pytest.approx(-1.0)


def nearest_neighbour(training, pictures):
    """A generator that looks the patient up: the training volume whose radiograph is the most alike."""
    known = np.stack([radiograph(hu, SPACING) for hu in training])
    return [training[int(((known - picture) ** 2).sum((1, 2)).argmin())] for picture in pictures]


@pytest.fixture(scope="module")
def cohort():
    """Reports on five patients of a model that is right but for noise."""
    held_out = [phantom(seed) for seed in range(5)]
    truths = [in_window(one.hu) for one in held_out]
    order = derangement(5)
    mean = mean_volume(truths)
    right = [truth + np.random.default_rng(i).normal(0, 20, SIZE) for i, truth in enumerate(truths)]
    return [
        case_report(
            truths[i],
            {"right": right[i], "shuffled": right[order[i]], "mean": mean},
            one.affine,
            WINDOW,
            mirrored_hu=mirror(right[i]),
            samples_hu=[right[i], right[i][:, ::-1]],
        )
        for i, one in enumerate(held_out)
    ]


@pytest.mark.slow
def test_the_nearest_neighbour_beats_a_shuffled_radiograph():
    training = [in_window(phantom(seed).hu) for seed in range(100, 140)]
    held_out = [phantom(seed) for seed in range(10)]
    right = nearest_neighbour(training, [radiograph(one.hu, SPACING) for one in held_out])
    order = derangement(len(held_out))
    mean = mean_volume(training)
    report = summarise(
        [
            case_report(
                in_window(one.hu), {"right": right[i], "shuffled": right[order[i]], "mean": mean}, one.affine, WINDOW
            )
            for i, one in enumerate(held_out)
        ],
        resamples=300,
    )
    assert report["gains"]["shuffled"]["psnr_body_db"]["low"] > 0.5
    assert report["gains"]["shuffled"]["drr_ncc"]["low"] > 0
    assert report["correlations"]["right"]["body_width_mm"]["estimate"] > 0.9
    assert report["correlations"]["shuffled"]["body_width_mm"]["estimate"] < 0.7
    assert report["chirality"]["share_right_way_round"] == 1.0


def test_figures_of_a_model_that_is_right(cohort):
    report = summarise(cohort, resamples=200)
    assert report["cases"] == 5
    assert report["gains"]["shuffled"]["psnr_body_db"]["low"] > 5
    assert report["gains"]["shuffled"]["mae_body_hu"]["low"] > 0  # positive: right is better
    assert report["correlations"]["right"]["lung_ml"]["estimate"] > 0.99
    assert report["correlations"]["shuffled"]["lung_ml"]["estimate"] < 0.9
    assert report["chirality"]["share_right_way_round"] == 1.0
    assert report["mirror"]["ncc_mirrored"]["estimate"] == pytest.approx(1.0)
    assert 0 < report["diversity"]["ms_ssim"]["estimate"] < 1
    # the second sample is upside-down front to back: the mean of the two is worse
    assert report["gains"]["right_mean"]["psnr_body_db"]["low"] > 0
    assert report["correlations"]["right"]["body_ml"]["estimate"] > 0.99
    # whether projections of five phantoms differ by 0.05 is up to them
    missed = {bar["bar"] for bar in report["bars"] if not bar["passed"]}
    assert missed <= {"patients evaluated", "NCC of projections in the body: gain over shuffled"}


def test_five_patients_are_too_few_for_the_bars(cohort):
    few = summarise(cohort, resamples=5)["bars"][0]
    assert few == {"bar": "patients evaluated", "low": 5, "asked": 64, "passed": False}
    enough = summarise((13 * cohort)[:64], resamples=5)["bars"][0]
    assert enough == few | {"low": 64, "passed": True}


def test_the_side_must_follow_a_mirrored_radiograph():
    """Who draws the heart on the left whatever the picture shows is right about every upright patient."""
    held_out = [phantom(seed) for seed in range(3)]

    def bar_of(answer):
        cases = []
        for one in held_out:
            hu = in_window(one.hu)
            cases.append(case_report(hu, {"right": hu}, one.affine, WINDOW, mirrored_hu=answer(hu)))
        summary = summarise(cases, resamples=50)
        assert summary["chirality"]["share_right_way_round"] == 1.0
        (bar,) = [bar for bar in summary["bars"] if "chirality" in bar["bar"]]
        return bar

    assert bar_of(mirror)["passed"]
    habit = bar_of(lambda hu: hu)
    assert (habit["asked"], habit["passed"]) == (0.0, False)
    assert habit["low"] < 0
    assert not bar_of(lambda hu: (hu + mirror(hu)) / 2)["passed"]  # neither side: no more than 0


def test_records_from_before_a_measure_was_added_still_count(cohort):
    old = json.loads(json.dumps(cohort))
    for case in old:
        del case["scores"]["right"]["psnr_slice_db"]
        for measures in case["anatomy"].values():
            del measures["body_ml"]
    old[0]["cone"], old[1]["cone"] = {"ncc": 0.5}, {"ncc": 0.7, "ncc_shuffled": 0.3}
    report = summarise(old, resamples=20)
    assert report["correlations"]["right"]["body_ml"]["n"] == 0
    assert report["correlations"]["right"]["lung_ml"]["n"] == 5
    assert report["gains"]["shuffled"]["psnr_slice_db"]["n"] == 0
    assert (report["cone"]["ncc"]["n"], report["cone"]["ncc_shuffled"]["n"]) == (2, 1)


def test_intervals_hold_their_estimates_and_order_does_not_matter(cohort):
    report = summarise(cohort, resamples=100)
    for role, scores in report["scores"].items():
        for figure in scores.values():
            assert figure["low"] <= figure["estimate"] <= figure["high"]
            assert figure["n"] == 5, role
    turned = summarise(cohort[::-1], resamples=2)
    for name, figure in report["scores"]["right"].items():
        assert turned["scores"]["right"][name]["estimate"] == pytest.approx(figure["estimate"])


def test_a_report_survives_json(cohort):
    assert summarise(json.loads(json.dumps(cohort)), resamples=20) == summarise(cohort, resamples=20)


def test_a_blind_model_misses_the_bars():
    held_out = [phantom(seed) for seed in range(3)]
    mean = mean_volume([in_window(one.hu) for one in held_out])
    roles = {"right": mean, "shuffled": mean, "mean": mean}
    blind = summarise([case_report(one.hu, roles, one.affine, WINDOW) for one in held_out], resamples=50)
    assert blind["gains"]["shuffled"]["psnr_body_db"]["estimate"] == 0
    # a correlation with a constant is no number, and no number passes no bar
    assert {bar["bar"] for bar in blind["bars"] if bar["passed"]} <= {"NCC of projections in the body"}


def test_t43_a_volume_of_nan_gives_nan_and_no_exception():
    one = phantom(0)
    report = case_report(one.hu, {"right": np.full(SIZE, np.nan, np.float32)}, one.affine, WINDOW)
    assert math.isnan(report["scores"]["right"]["psnr_body_db"])
    assert report["anatomy"]["right"]["lung_ml"] == 0
    summary = summarise([report])
    assert math.isnan(summary["scores"]["right"]["psnr_db"]["estimate"])
    assert summary["scores"]["right"]["psnr_db"]["n"] == 0
    assert not any(bar["passed"] for bar in summary["bars"])


def test_bad_input_is_told():
    one = phantom(0)
    with pytest.raises(ConfigurationError, match="right"):
        case_report(one.hu, {"mean": one.hu}, one.affine, WINDOW)
    with pytest.raises(InputError, match="one grid"):
        case_report(one.hu, {"right": one.hu[1:]}, one.affine, WINDOW)
    with pytest.raises(InputError, match="no cases"):
        summarise([])
