"""The verdict on samplers: 10 to 20 steps against 250, by both figures, and none where they were not measured."""

import math

import numpy as np
import pytest

from evaluation.sampler_verdict import judge, print_table


def row(steps, psnr=20.0, frechet=1.0, sampler="ddim"):
    draws = frechet * np.linspace(1.0, 1.4, 50)
    figures = {
        "psnr_body_db": psnr,
        "psnr_db": psnr,
        "drr_ncc": 0.9,
        "frechet": frechet,
        "passes": steps,
        "seconds": 1.0,
    }
    return {"sampler": sampler, "steps": steps, "frechet_draws": draws.tolist(), "frechet_low": 0.9 * frechet,
            "frechet_high": 1.1 * frechet, **figures}  # fmt: skip


def test_enough_steps_are_judged_by_both_figures():
    few = [row(5, 21.0, 1.0), row(10, 20.5, 1.2), row(20, 20.5, 1.04), row(50), row(250)]
    verdict = judge(few)["ddim"]  # 5 and 50 steps are not asked for; 10: better PSNR by blur, worse distance
    assert (verdict["reference"], verdict["enough"]) == (250, 20)
    assert [one["steps"] for one in verdict["candidates"]] == [10, 20]
    assert [one["passed"] for one in verdict["candidates"]] == [False, True]
    ratio = verdict["candidates"][0]["frechet_ratio"]
    # the same patients in both rows: what they have in common cancels
    assert ratio["estimate"] == pytest.approx(1.2)
    assert ratio["low"] == pytest.approx(1.2)
    assert ratio["high"] == pytest.approx(1.2)
    assert judge([row(10, 10.0), row(250)])["ddim"]["enough"] is None
    assert judge([row(10, 20.0, math.nan), row(250)])["ddim"]["enough"] is None


@pytest.mark.parametrize(("steps", "word"), [((10, 20, 50), "no run of 250"), ((5, 50, 250), "no run of 10 to 20")])
def test_no_verdict_without_both_ends_of_the_claim(steps, word):
    verdict = judge([row(count) for count in steps])["ddim"]
    assert word in verdict["refused"]
    assert "enough" not in verdict


def test_the_table_shows_the_floor_and_judges_samplers_alone(capsys):
    rows = [row(0, 24.0, 0.5, "codec"), row(10), row(250), row(10, sampler="heun")]
    verdicts = judge(rows)
    assert set(verdicts) == {"ddim", "heun"}
    print_table({"cases": 64, "features": "of somebody", "rows": rows, "verdicts": verdicts})
    shown = capsys.readouterr().out
    assert "ddim: 10 steps are within 5% of 250" in shown
    assert "heun: no verdict" in shown
    assert "passes" in shown
    assert "[0.45, 0.55]" in shown
