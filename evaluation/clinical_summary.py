"""Cohort figures of the clinical evaluation from the records of its patients, as plain numbers with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from evaluation.clinical_case import COMPARED
from evaluation.metrics.frechet import PLANES, frechet_of_planes
from evaluation.metrics.lesions import Lesion, survival
from evaluation.metrics.statistics import Interval, auroc_interval, bootstrap, brier, delong

JUDGED = ("real", "codec", "generated", "shuffled", "xray")


def summarise(patients: Mapping[str, Mapping[str, Any]], *, resamples: int = 2000) -> dict[str, Any]:
    """All figures but the Fréchet distance.

    Args:
        patients: records of `evaluation.clinical_case.case_record` by name.
        resamples: of the bootstrap over patients.

    Returns:
        ``cases``, ``with_embolism``; by role ``auroc`` (estimate, low, high, n) and ``calibration`` (``brier`` with
        interval, ``mean_probability``, ``prevalence``, ``brier_of_prevalence``); ``delong``, one entry for each pair of
        roles on the cases that both have, p values not corrected for their number; ``dice`` by role and part; of
        phantoms ``lesions``. ``conclusive`` says whether the classifier tells embolisms in the scans themselves (its
        interval lies above 0.5): one that does not has no verdict on the other volumes.
    """
    records = list(patients.values())
    report: dict[str, Any] = {
        "cases": len(records),
        "with_embolism": sum(record["label"] == 1 for record in records),
        "auroc": {},
        "calibration": {},
        "delong": [],
        "dice": _dice(records, resamples),
    }
    for role in JUDGED:
        scores, labels = _scores(records, role)
        if _both(labels):
            report["auroc"][role] = _plain(auroc_interval(scores[:, 0], labels, resamples=resamples), len(labels))
            report["calibration"][role] = _calibration(scores[:, 0], labels, resamples)
    for first, second in combinations(JUDGED, 2):
        scores, labels = _scores(records, first, second)
        if _both(labels):
            test = delong(scores[:, 0], scores[:, 1], labels)
            difference = _plain(test.difference, len(labels))
            report["delong"].append(
                {"first": first, "second": second, "difference": difference, "p_value": test.p_value}
            )
    report["conclusive"] = "real" in report["auroc"] and report["auroc"]["real"]["low"] > 0.5
    if any("lesions" in record for record in records):
        report["lesions"] = _lesions(patients)
    return report


def frechet(features: Sequence[Mapping[str, np.ndarray]]) -> dict[str, dict[str, float]]:
    """2.5-D Fréchet distance of what was generated from the real volumes, by role.

    Args:
        features: of `evaluation.clinical_case.features_of`, one entry a patient.
    """
    by_role = {
        role: [{plane: rows[f"{role}_{plane}"] for plane in PLANES} for rows in features]
        for role in ("real", *COMPARED)
    }
    return {role: frechet_of_planes(by_role["real"], by_role[role]) for role in COMPARED}


def _scores(records: Sequence[Mapping[str, Any]], *roles: str) -> tuple[np.ndarray, np.ndarray]:
    """Scores (n, roles) and labels (n,) of the patients that have all of these."""
    chosen = [record for record in records if all(role in record["scores"] for role in roles)]
    scores = np.array([[record["scores"][role] for role in roles] for record in chosen], dtype=np.float64)
    return scores.reshape(-1, len(roles)), np.array([record["label"] == 1 for record in chosen], dtype=bool)


def _both(labels: np.ndarray) -> bool:
    """Whether a variance can be estimated: two of each kind."""
    return min(int(labels.sum()), int((~labels).sum())) >= 2


def _calibration(scores: np.ndarray, labels: np.ndarray, resamples: int) -> dict[str, Any]:
    prevalence = float(labels.mean())
    interval = bootstrap(scores, labels, statistic=lambda s, y: brier(s, y > 0.5), resamples=resamples)
    return {
        "brier": _plain(interval, len(labels)),
        "brier_of_prevalence": prevalence * (1 - prevalence),
        "mean_probability": float(np.mean(1 / (1 + np.exp(-np.clip(scores, -500, 500))))),
        "prevalence": prevalence,
    }


def _dice(records: Sequence[Mapping[str, Any]], resamples: int) -> dict[str, Any]:
    """Means over patients by reference, role and part."""
    report: dict[str, Any] = {}
    for reference in ("phantom", "scan"):
        chosen = [record["dice"] for record in records if record["dice_with"] == reference]
        if not chosen:
            continue
        report[reference] = {
            role: {
                part: _plain(bootstrap([one[role][part] for one in chosen], resamples=resamples), len(chosen))
                for part in parts
            }
            for role, parts in chosen[0].items()
        }
    return report


def _lesions(patients: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """How many patients have an embolus, on how many grids it is there, in how many scans it can be seen; survival."""
    known = {name: record for name, record in patients.items() if "lesions" in record and record["label"] == 1}
    shown = {
        role: {name: [Lesion(**lesion) for lesion in record["lesions"][role]] for name, record in known.items()}
        for role in COMPARED
    }
    report: dict[str, Any] = {
        "patients_with_embolism": len(known),
        "patients_with_clot_voxels": sum(record["lesions"]["painted_vox"] > 0 for record in known.values()),
        "patients_with_visible_clot": sum(bool(lesions) for lesions in shown[COMPARED[0]].values()),
        "visible_clots": sum(len(lesions) for lesions in shown[COMPARED[0]].values()),
    }
    if report["visible_clots"]:
        report["survival"] = {role: survival(lesions) for role, lesions in shown.items()}
    return report


def _plain(interval: Interval, count: int) -> dict[str, float]:
    low, high = interval.low, interval.high
    return {"estimate": interval.estimate, "low": low, "high": high, "n": count}
