"""Clinical evaluation of a cohort: areas, tests, lesions, distances."""

from __future__ import annotations

import math

import numpy as np
import pytest

from evaluation.clinical_summary import frechet, summarise
from evaluation.clinical_table import print_report
from evaluation.metrics.statistics import auroc, delong


def records(count=40, seed=0):
    """Patients whose scan is judged without a mistake, whose codec's volume well, and whose generated one by chance."""
    rng = np.random.default_rng(seed)
    found = {}
    for number in range(count):
        label = number % 2
        scores = {
            "real": 4.0 * label - 2 + 0.1 * rng.normal(),
            "codec": 2.0 * label - 1 + rng.normal(),
            "generated": rng.normal(),
            "shuffled": rng.normal(),
        }
        if number >= 4:
            scores["xray"] = 1.5 * label + rng.normal()
        dice = {role: {"lungs": 0.9, "heart": 0.5 + 0.01 * number} for role in ("real", "codec", "generated")}
        lesion = {"diameter_mm": 12.0, "contrast_hu": 200.0, "contrast_after_hu": 150.0}
        lost = lesion | {"contrast_after_hu": 20.0}
        clots = {"painted_vox": 9 * label, "codec": [lesion] * label, "generated": [lost] * label, "shuffled": []}
        if number == 1:  # its clot is smaller than a voxel
            clots = {"painted_vox": 0, "codec": [], "generated": [], "shuffled": []}
        found[f"p{number:02d}"] = {
            "label": label, "scores": scores, "dice": dice, "dice_with": "phantom", "lesions": clots,
        }  # fmt: skip
    return found


def test_areas_and_tests_are_those_of_the_scores():
    patients = records()
    report = summarise(patients, resamples=100)
    labels = np.array([record["label"] for record in patients.values()])
    scores = {role: np.array([r["scores"].get(role, np.nan) for r in patients.values()]) for role in report["auroc"]}
    assert (report["cases"], report["with_embolism"]) == (40, 20)
    assert report["auroc"]["real"]["estimate"] == 1.0
    assert report["auroc"]["codec"]["estimate"] == pytest.approx(auroc(scores["codec"], labels))
    assert report["auroc"]["codec"]["low"] < report["auroc"]["codec"]["estimate"] < report["auroc"]["codec"]["high"]
    assert report["auroc"]["xray"]["n"] == 36
    assert report["conclusive"]
    assert len(report["delong"]) == 10
    (row,) = [r for r in report["delong"] if (r["first"], r["second"]) == ("generated", "xray")]
    paired = delong(scores["generated"][4:], scores["xray"][4:], labels[4:])
    assert row["p_value"] == pytest.approx(paired.p_value)
    assert row["difference"]["estimate"] == pytest.approx(paired.difference.estimate)
    assert row["difference"]["n"] == 36
    calibration = report["calibration"]["real"]
    assert calibration["brier"]["estimate"] == pytest.approx((1 / (1 + math.exp(2))) ** 2, rel=0.1)
    assert calibration["brier_of_prevalence"] == 0.25


def test_a_judge_who_is_blind_to_the_scans_has_no_verdict():
    patients = records()
    for record in patients.values():
        record["scores"]["real"] = record["scores"]["shuffled"]
    assert not summarise(patients, resamples=100)["conclusive"]


def test_overlaps_and_lesions_over_the_cohort():
    report = summarise(records(), resamples=100)
    assert set(report["dice"]) == {"phantom"}
    heart = report["dice"]["phantom"]["generated"]["heart"]
    assert heart["estimate"] == pytest.approx(0.5 + 0.01 * 19.5)
    assert heart["low"] < heart["estimate"] < heart["high"]
    lesions = report["lesions"]
    assert lesions["patients_with_embolism"] == 20
    assert (
        lesions["patients_with_clot_voxels"] == lesions["patients_with_visible_clot"] == lesions["visible_clots"] == 19
    )
    assert lesions["survival"]["codec"]["all"]["survived"]["estimate"] == 1
    assert lesions["survival"]["generated"]["all"]["survived"]["estimate"] == 0
    assert lesions["survival"]["generated"]["all"]["kept"] == pytest.approx(0.1)


def test_a_cohort_without_visible_clots_says_so(capsys):
    patients = records(8)
    for record in patients.values():
        record["lesions"] = {"painted_vox": 0, "codec": [], "generated": [], "shuffled": []}
        record["dice_with"] = "scan"
    report = summarise(patients, resamples=100)
    assert "survival" not in report["lesions"]
    planes = dict.fromkeys(("frechet", "frechet_axial", "frechet_coronal", "frechet_sagittal"), 1.0)
    print_report(report | {"frechet": {"features": "some network", "by_role": {"codec": planes}}})
    printed = capsys.readouterr().out
    assert "of 4 phantoms with embolism 0 have a voxel of clot" in printed
    assert "Dice with the segmentation of the scan" in printed
    assert "some network" in printed
    assert "INCONCLUSIVE" not in printed
    print_report(report | {"conclusive": False, "frechet": {"features": "some network", "by_role": {"codec": planes}}})
    assert "INCONCLUSIVE" in capsys.readouterr().out
    # four patients of whom each kind is there twice have areas, but only four have a radiograph's score
    assert report["auroc"]["xray"]["n"] == 4


def test_a_shift_of_features_is_its_square_in_distance():
    rng = np.random.default_rng(0)
    shift = np.array([3.0, 0.0, 4.0])
    patients = []
    for _ in range(6):
        rows = {plane: rng.normal(size=(5, 3)) for plane in ("axial", "coronal", "sagittal")}
        added = {"real": 0 * shift, "codec": 0 * shift, "generated": shift, "shuffled": 2 * shift}
        patients.append({f"{role}_{plane}": rows[plane] + by for role, by in added.items() for plane in rows})
    found = frechet(patients)
    assert found["codec"]["frechet"] == pytest.approx(0, abs=1e-9)
    assert found["generated"]["frechet_axial"] == pytest.approx(25)
    assert found["shuffled"]["frechet"] == pytest.approx(100)
