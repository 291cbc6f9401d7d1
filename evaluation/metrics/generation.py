"""What generated volumes are worth: case by case against the truth, and over a cohort with intervals and controls.

A chest looks like a chest: a volume that ignores its radiograph scores well on any image metric. Therefore each figure
stands beside controls: the volume made from another patient's radiograph, from none, the mean of the training volumes,
and what a linear regression makes of the radiograph. What the radiograph contributes is the paired gain over the first
three, what the model is worth the gain over the last, and of a gain the lower end of its 95 % interval counts.
Functions here take arrays and return plain numbers; `evaluation/xray_to_ct.py` runs the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from dataset.geometry import spacing_mm
from dataset.intensity import HUWindow
from errors import ConfigurationError, InputError
from evaluation.metrics.anatomy import body_mask, measure
from evaluation.metrics.diversity import sample_diversity
from evaluation.metrics.image import bias_hu, mae_hu, psnr, psnr_slice, ssim_3d
from evaluation.metrics.projection import chirality, mirror, ncc, projection_ncc, radiograph
from evaluation.metrics.statistics import Interval, bootstrap

# Where a volume came from. "right" is the model with the patient's own radiograph; the others are its controls.
RIGHT = "right"
CONTROLS = ("shuffled", "unconditional", "mean", "linear")
_MEASURED = (RIGHT, "right_mean", "shuffled", "linear")
# Measures whose correlation with the truth says that the model saw the patient.
CORRELATED = ("lung_ml", "body_ml", "heart_ml", "heart_shadow_cm2", "body_width_mm", "vessel_ml")
# Figures of which one volume can have more than another; of a signed bias it cannot.
GAINS = ("psnr_body_db", "psnr_db", "psnr_slice_db", "ssim", "mae_body_hu", "mae_hu", "drr_ncc", "drr_ncc_body")
Draw = Callable[..., Interval]
# The bars of the project: figure, control, least lower end of its interval.
GAIN_BAR_DB = 2.0
CORRELATION_BAR = 0.9
DRR_BAR, DRR_GAIN_BAR = 0.95, 0.05
MIRROR_BAR = 0.0  # to be exceeded
PATIENTS_BAR = 64  # of fewer patients no bar is passed by the project's standard, whatever the intervals say


def derangement(count: int, seed: int = 0) -> list[int]:
    """A fixed permutation without fixed points: case i gets the radiograph of case ``derangement(n)[i]``.

    Sattolo's algorithm (1986): one cycle through all, so nobody keeps the own radiograph.

    Raises:
        ConfigurationError: fewer than two cases, which cannot be exchanged.
    """
    if count < 2:
        raise ConfigurationError(f"{count} case: radiographs can be exchanged among two or more, give --cases 2")
    order = list(range(count))
    rng = np.random.default_rng(seed)
    for last in range(count - 1, 0, -1):
        other = int(rng.integers(0, last))
        order[last], order[other] = order[other], order[last]
    return order


def mean_volume(volumes: Iterable[np.ndarray]) -> np.ndarray:
    """Voxel-wise mean (D, H, W) float32 of volumes of one shape, one in memory at a time.

    Raises:
        InputError: no volume, or shapes that differ.
    """
    total: np.ndarray | None = None
    count = 0
    for volume in volumes:
        if total is None:
            total = np.zeros(volume.shape, dtype=np.float64)
        if volume.shape != total.shape:
            raise InputError(f"volumes {list(total.shape)} and {list(volume.shape)}: a mean needs one size")
        total += volume
        count += 1
    if total is None:
        raise InputError("no training volumes: the mean volume needs at least one")
    return (total / count).astype(np.float32)


def masked_psnr(pred_unit: np.ndarray, target_unit: np.ndarray, mask: np.ndarray) -> float:
    """PSNR in dB on the whole window over the voxels of a mask; infinite for equal volumes, NaN for an empty mask.

    Args:
        pred_unit: in [0, 1], any shape.
        target_unit: the same shape and range.
        mask: bool, the same shape.
    """
    if not mask.any():
        return math.nan
    error = pred_unit[mask].astype(np.float64) - target_unit[mask]
    mean_square = float(np.mean(error * error))
    return math.inf if mean_square == 0 else -10.0 * math.log10(mean_square)


def volume_scores(
    generated_hu: np.ndarray, true_hu: np.ndarray, body: np.ndarray, affine: np.ndarray, window: HUWindow
) -> dict[str, float]:
    """Scores of one volume against the truth.

    Args:
        generated_hu: (D, H, W) HU.
        true_hu: the same shape.
        body: bool, the true body.
        affine: (4, 4) of both.
        window: PSNR and SSIM are on it, and errors in HU after its clipping.

    Returns:
        ``psnr_body_db`` and ``mae_body_hu`` inside the body, ``psnr_db``, ``psnr_slice_db`` (mean over axial slices,
        the convention of 2D papers), ``ssim``, ``mae_hu``, ``bias_hu`` of the whole volume, and ``drr_ncc``,
        ``drr_ncc_body`` of its frontal projection with the truth's.

    Raises:
        InputError: the shapes differ.
    """
    if generated_hu.shape != true_hu.shape:
        raise InputError(f"generated {list(generated_hu.shape)} and true volume {list(true_hu.shape)}: one grid needed")
    unit, true_unit = (window.to_unit(np.asarray(values)) for values in (generated_hu, true_hu))
    tensors = torch.from_numpy(unit), torch.from_numpy(true_unit)
    inside = np.abs(unit[body] - true_unit[body])
    return {
        "psnr_body_db": masked_psnr(unit, true_unit, body),
        "psnr_db": psnr(*tensors),
        "psnr_slice_db": psnr_slice(*tensors),
        "ssim": ssim_3d(*tensors),
        "mae_body_hu": float(inside.mean(dtype=np.float64)) * window.width_hu if inside.size else math.nan,
        "mae_hu": mae_hu(*tensors, window),
        "bias_hu": bias_hu(*tensors, window),
        **projection_ncc(window.to_hu(unit), window.to_hu(true_unit), spacing_mm(affine)),
    }


def case_report(
    true_hu: np.ndarray,
    generated_hu: Mapping[str, np.ndarray],
    affine: np.ndarray,
    window: HUWindow,
    *,
    mirrored_hu: np.ndarray | None = None,
    samples_hu: Sequence[np.ndarray] = (),
) -> dict[str, Any]:
    """Everything about one patient, as plain numbers (JSON-able), for `summarise`.

    Args:
        true_hu: (D, H, W) HU.
        generated_hu: by role: "right", and any of `CONTROLS`; other names are scored and reported too.
        affine: (4, 4).
        window: of the comparison.
        mirrored_hu: the volume made from the patient's mirrored radiograph.
        samples_hu: several volumes from the right radiograph, "right" being the first; two or more give diversity, and
            their mean is scored as "right_mean".

    Returns:
        ``scores`` by role, ``anatomy`` of the truth, the right, the shuffled and the linear volume, ``chirality``
        and, where given, ``mirror`` and ``diversity``.

    Raises:
        ConfigurationError: "right" is missing. InputError: shapes differ.
    """
    if RIGHT not in generated_hu:
        raise ConfigurationError(f"volumes of {', '.join(generated_hu) or 'no role'}: {RIGHT!r} is needed")
    roles = dict(generated_hu)
    if len(samples_hu) > 1:
        roles["right_mean"] = mean_volume(samples_hu)
    body = body_mask(true_hu, affine)
    spacing = spacing_mm(affine)
    report: dict[str, Any] = {
        "scores": {role: volume_scores(volume, true_hu, body, affine, window) for role, volume in roles.items()},
        "anatomy": {"truth": measure(true_hu, affine)}
        | {role: measure(roles[role], affine) for role in _MEASURED if role in roles},
        "chirality": chirality(roles[RIGHT], radiograph(true_hu, spacing), spacing),
    }
    if mirrored_hu is not None:
        report["mirror"] = mirror_scores(roles[RIGHT], mirrored_hu)
    if len(samples_hu) > 1:
        report["diversity"] = sample_diversity(samples_hu, window)
    return report


def mirror_scores(generated_hu: np.ndarray, from_mirrored_hu: np.ndarray) -> dict[str, float]:
    """Does the mirrored radiograph of a patient give the mirrored volume?

    Args:
        generated_hu: (D, H, W) from the radiograph.
        from_mirrored_hu: from the same radiograph mirrored, with the same noise.

    Returns:
        ``ncc_mirrored``: of ``from_mirrored`` with the mirrored volume; ``ncc_same``: with the volume itself; and their
        difference ``gain``, positive where the model follows the picture rather than its habit.
    """
    mirrored = ncc(from_mirrored_hu, mirror(generated_hu))
    same = ncc(from_mirrored_hu, generated_hu)
    return {"ncc_mirrored": mirrored, "ncc_same": same, "gain": mirrored - same}


def pearson(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's r; NaN for fewer than three values or a constant one."""
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    return float(np.corrcoef(first, second)[0, 1])


def summarise(cases: Sequence[Mapping[str, Any]], *, seed: int = 0, resamples: int = 2000) -> dict[str, Any]:
    """Cohort figures with 95 % bootstrap intervals over patients.

    Args:
        cases: of `case_report`, in any order; roles that a case lacks are left out for it.
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Returns:
        ``cases`` (their number), ``scores`` by role and metric, ``gains`` of "right" over each control, positive where
        right is better, also for errors; ``correlations`` with the truth by role; ``chirality``, and ``mirror``,
        ``cone``, ``diversity``, ``retrieval`` where measured; and ``bars``. Every figure is ``{"estimate", "low",
        "high", "n"}``.

    Raises:
        InputError: no cases.
    """
    if not cases:
        raise InputError("no cases: nothing to summarise")
    draw = partial(bootstrap, seed=seed, resamples=resamples)
    roles = list(dict.fromkeys(role for case in cases for role in case["scores"]))
    scores = {
        role: {
            # a record that was made before a metric was added lacks it
            metric: _interval([case["scores"].get(role, {}).get(metric, math.nan) for case in cases], draw)
            for metric in next(case["scores"][role] for case in cases if role in case["scores"])
        }
        for role in roles
    }
    report: dict[str, Any] = {
        "cases": len(cases),
        "scores": scores,
        "gains": {
            role: {metric: _gain(cases, role, metric, draw) for metric in GAINS} for role in roles if role != RIGHT
        },
        "correlations": {
            role: {name: _correlation(cases, role, name, draw) for name in CORRELATED}
            for role in _MEASURED
            if any(role in case["anatomy"] for case in cases)
        },
        "chirality": _interval([case["chirality"] for case in cases], draw)
        | {"share_right_way_round": float(np.mean([case["chirality"] > 0 for case in cases]))},
    }
    for part in ("mirror", "cone", "diversity", "retrieval"):
        if given := [case[part] for case in cases if part in case]:
            names = dict.fromkeys(name for values in given for name in values)
            report[part] = {name: _interval([values.get(name, math.nan) for values in given], draw) for name in names}
    return report | {"bars": bars(report)}


def bars(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The project's bars: for each the lower end of its interval, what is asked, whether it is passed.

    The first is on the number of patients (``low``, an int): intervals of a few phantoms promise too much.
    Chirality is asked of the mirrored radiograph: whoever draws the heart on the left whatever the picture shows passes
    any comparison of an upright patient.
    """
    asked: list[tuple[str, float, float]] = []
    for control in ("shuffled", "mean"):
        if control in report["gains"]:
            low = report["gains"][control]["psnr_body_db"]["low"]
            asked.append((f"PSNR in the body: gain over {control}, dB", low, GAIN_BAR_DB))
    found = report["correlations"][RIGHT]
    asked += [(f"correlation of {name}", found[name]["low"], CORRELATION_BAR) for name in ("lung_ml", "body_width_mm")]
    asked.append(("NCC of projections in the body", report["scores"][RIGHT]["drr_ncc_body"]["low"], DRR_BAR))
    if "shuffled" in report["gains"]:
        low = report["gains"]["shuffled"]["drr_ncc_body"]["low"]
        asked.append(("NCC of projections in the body: gain over shuffled", low, DRR_GAIN_BAR))
    patients = int(report["cases"])
    found_bars: list[dict[str, Any]] = [
        {"bar": "patients evaluated", "low": patients, "asked": PATIENTS_BAR, "passed": patients >= PATIENTS_BAR}
    ]
    found_bars += [{"bar": name, "low": low, "asked": least, "passed": low >= least} for name, low, least in asked]
    if "mirror" in report:
        low = report["mirror"]["gain"]["low"]
        name = "chirality: mirrored X-ray, NCC with the mirrored volume minus NCC with the volume itself"
        found_bars.append({"bar": name, "low": low, "asked": MIRROR_BAR, "passed": low > MIRROR_BAR})
    return found_bars


def _gain(cases: Sequence[Mapping[str, Any]], control: str, metric: str, draw: Draw) -> dict[str, float]:
    sign = -1.0 if metric.startswith("mae") else 1.0
    compared = [case["scores"] for case in cases if control in case["scores"]]
    pairs = [(scores[RIGHT].get(metric, math.nan), scores[control].get(metric, math.nan)) for scores in compared]
    return _interval([sign * (right - other) for right, other in pairs], draw)


def _correlation(cases: Sequence[Mapping[str, Any]], role: str, name: str, draw: Draw) -> dict[str, float]:
    # a record that was made before a measure was added lacks it
    measured = [(case["anatomy"][role], case["anatomy"]["truth"]) for case in cases if role in case["anatomy"]]
    rows = [(drawn.get(name, math.nan), truth.get(name, math.nan)) for drawn, truth in measured]
    found = np.array([row for row in rows if np.isfinite(row).all()]).reshape(-1, 2)
    if not len(found):
        return {"estimate": math.nan, "low": math.nan, "high": math.nan, "n": 0}
    return _as_dict(draw(found[:, 0], found[:, 1], statistic=pearson), len(found))


def _interval(values: Sequence[float], draw: Draw) -> dict[str, float]:
    """Mean with its interval over the finite values; ``n`` says how many those were."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return {"estimate": math.nan, "low": math.nan, "high": math.nan, "n": 0}
    return _as_dict(draw(finite), len(finite))


def _as_dict(interval: Interval, count: int) -> dict[str, float]:
    return {"estimate": interval.estimate, "low": interval.low, "high": interval.high, "n": count}
