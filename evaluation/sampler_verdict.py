"""Are 10 to 20 steps of a sampler as good as 250? The verdict on a table of samplers, and the table in print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CODEC = "codec"  # the row of the CTs themselves through the codec: no sampler can do better
# The claim that is judged: so few steps (from, to) against at least so many.
FEW, MANY = (10, 20), 250
# "As good": within this share of the row of many steps, in PSNR in the body and in the Fréchet distance.
TOLERANCE = 0.05


def judge(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each sampler the fewest of 10 to 20 steps within 5 % of its longest run, in PSNR and Fréchet distance.

    Args:
        rows: of `evaluation.sampler_table`; ``frechet_draws`` are of the same resampled patients in each row, so that
            their ratios are paired.

    Returns:
        By sampler ``refused`` (a reason) where there is nothing to judge; else ``reference`` (its greatest number of
        steps), ``candidates`` (each with ``steps``, ``psnr_ratio``, ``frechet_ratio`` with its 95 % interval and
        ``passed``) and ``enough`` (None where none is as good). A better figure than the reference's counts as within.
    """
    verdicts: dict[str, dict[str, Any]] = {}
    for sampler in dict.fromkeys(row["sampler"] for row in rows if row["sampler"] != CODEC):
        own = sorted((row for row in rows if row["sampler"] == sampler), key=lambda row: row["steps"])
        last, few = own[-1], [row for row in own if FEW[0] <= row["steps"] <= FEW[1]]
        if last["steps"] < MANY or not few:
            lacking = f"no run of {MANY} steps" if last["steps"] < MANY else f"no run of {FEW[0]} to {FEW[1]} steps"
            verdicts[sampler] = {"refused": f"{lacking}: add it to --steps"}
            continue
        candidates = [_compared(row, last) for row in few]
        enough = min((one["steps"] for one in candidates if one["passed"]), default=None)
        verdicts[sampler] = {"reference": last["steps"], "candidates": candidates, "enough": enough}
    return verdicts


def _compared(row: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    from evaluation.metrics.frechet_interval import centred_interval  # imports torch, which --help need not wait for

    with np.errstate(divide="ignore", invalid="ignore"):  # a distance of exactly 0 has no ratios
        psnr, frechet = (
            float(np.float64(row[key]) / np.float64(reference[key])) for key in ("psnr_body_db", "frechet")
        )
        low, high = centred_interval(frechet, np.array(row["frechet_draws"]) / np.array(reference["frechet_draws"]))
    return {
        "steps": row["steps"],
        "psnr_ratio": psnr,
        "frechet_ratio": {"estimate": frechet, "low": low, "high": high},
        "passed": row["psnr_body_db"] >= (1 - TOLERANCE) * reference["psnr_body_db"]
        and row["frechet"] <= (1 + TOLERANCE) * reference["frechet"],
    }


def print_table(report: dict[str, Any]) -> None:
    """All rows, and the verdict on each sampler."""
    print(f"\n{report['cases']} held-out patients [95 % interval over them]; Fréchet distance: {report['features']}")
    print(f"{'sampler':18} steps passes PSNR body dB  PSNR dB  DRR NCC    Fréchet{'s/volume':>35}")
    for row in report["rows"]:
        figures = f"{row['psnr_body_db']:12.2f} {row['psnr_db']:8.2f} {row['drr_ncc']:8.4f} {row['frechet']:10.4g}"
        between = f"[{row['frechet_low']:.4g}, {row['frechet_high']:.4g}]"
        print(f"{row['sampler']:18} {row['steps']:5d} {row['passes']:6d} {figures} {between:24} {row['seconds']:9.3f}")
    for sampler, verdict in report["verdicts"].items():
        print(f"{sampler}: {_sentence(verdict)}")


def _sentence(verdict: dict[str, Any]) -> str:
    if "refused" in verdict:
        return f"no verdict, {verdict['refused']}"
    enough = f"none of {FEW[0]} to {FEW[1]}" if verdict["enough"] is None else f"{verdict['enough']}"
    tried = "; ".join(_candidate(one) for one in verdict["candidates"])
    return f"{enough} steps are within {TOLERANCE:.0%} of {verdict['reference']} in PSNR and Fréchet distance ({tried})"


def _candidate(one: dict[str, Any]) -> str:
    ratio = one["frechet_ratio"]
    distance = f"×{ratio['estimate']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
    return f"{one['steps']}: PSNR ×{one['psnr_ratio']:.3f}, Fréchet {distance}"
