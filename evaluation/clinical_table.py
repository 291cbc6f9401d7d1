"""Tables of the clinical evaluation, for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_ROLES = {
    "real": "the scan",
    "codec": "after the codec",
    "generated": "generated from its radiograph",
    "shuffled": "generated from another's",
    "xray": "the radiograph alone",
}


def print_report(report: dict[str, Any]) -> None:
    """AUROC, comparisons, overlap, lesions and distances as tables."""
    print(f"\n{report['cases']} held-out patients, {report['with_embolism']} with embolism; [95 % interval]")
    print(f"{'what the classifier sees':32} {'AUROC':>22} {'Brier score':>22}  mean probability")
    for role, area in report["auroc"].items():
        calibration = report["calibration"][role]
        figures = f"{cell(area):>22} {cell(calibration['brier']):>22}  {calibration['mean_probability']:.3f}"
        print(f"{_ROLES[role]:32} {figures}")
    if report["calibration"]:
        first = next(iter(report["calibration"].values()))
        prevalence, score = first["prevalence"], first["brier_of_prevalence"]
        print(f"prevalence {prevalence:.3f}; who always says it has a Brier score of {score:.3f}")
    if not report["conclusive"]:
        print(
            "INCONCLUSIVE: the classifier does not tell embolisms in the scans themselves; the other rows say nothing"
        )
    print("\ndifferences of AUROC (DeLong, paired; p not corrected for their number)")
    for row in report["delong"]:
        pair = f"{_ROLES[row['first']]} - {_ROLES[row['second']]}"
        print(f"{pair:60} {cell(row['difference'], '{:+.3f}'):>26}  p = {row['p_value']:.3g}")
    for reference, roles in report["dice"].items():
        against = "the phantom's known masks" if reference == "phantom" else "the segmentation of the scan"
        print(f"\nDice with {against}")
        for role, parts in roles.items():
            cells = "  ".join(f"{part} {cell(value)}" for part, value in parts.items())
            print(f"{_ROLES[role]:32} {cells}")
    if "lesions" in report:
        _print_lesions(report["lesions"])
    print(f"\nFréchet distance to the scans: 2.5-D, {report['frechet']['features']}")
    for role, value in report["frechet"]["by_role"].items():
        planes = ", ".join(f"{plane} {value[f'frechet_{plane}']:.4g}" for plane in ("axial", "coronal", "sagittal"))
        print(f"{_ROLES[role]:32} {value['frechet']:.4g} ({planes})")


def _print_lesions(lesions: dict[str, Any]) -> None:
    print(
        f"\nof {lesions['patients_with_embolism']} phantoms with embolism {lesions['patients_with_clot_voxels']} have "
        f"a voxel of clot on this grid, {lesions['patients_with_visible_clot']} a clot that its scan shows (three "
        f"voxels and 50 HU less than the blood beside it), {lesions['visible_clots']} clots in all"
    )
    for role, groups in lesions.get("survival", {}).items():
        for group, row in groups.items():
            share = cell(row["survived"], "{:.0%}")
            figures = f"{row['lesions']:4d} clots, {share} survive, {row['kept']:.0%} of the contrast kept"
            print(f"{_ROLES[role]:32} {group:16} {figures}")


def cell(value: Mapping[str, float], form: str = "{:.3f}") -> str:
    """An estimate with its interval, for a table."""
    numbers = [value[key] for key in ("estimate", "low", "high")]
    estimate, low, high = ("-" if math.isnan(number) else form.format(number) for number in numbers)
    return f"{estimate} [{low}, {high}]"
