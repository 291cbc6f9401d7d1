"""From the records of all volumes to the figures of the data set: what `dataset_analysis.json` holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from preprocess.analysis_volume import HISTOGRAM_EDGES_HU

FORMAT = 1
NOT_STATED = "not stated"
_PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
# What makes up a "combination": the way in which a scan was made.
COMBINATION = ("manufacturer", "kernel", "kvp", "slice_thickness_mm", "slice_spacing_mm", "contrast_phase")
_MOST_COMMON = 10
_DISTRIBUTIONS = (
    "slice_thickness_mm",
    "slice_spacing_mm",
    "pixel_spacing_mm",
    "depth_vox",
    "depth_mm",
    "blood_hu",
)


def summarise_records(records: dict[str, dict[str, Any]], failures: dict[str, str]) -> dict[str, Any]:
    """The data set's figures.

    Args:
        records: by volume, as `analyse_volume` returns them.
        failures: reason by volume.

    Returns:
        JSON-able, and the same for the same records; see the keys. Lengths in mm, HU shares of all voxels.
    """
    rows = [{**record, **_derived(record)} for record in records.values()]
    histogram = np.mean([row["hu_histogram"] for row in rows], axis=0) if rows else np.zeros(0)
    combinations = Counter(tuple(str(_stated(row[key])) for key in COMBINATION) for row in rows)
    return {
        "format": FORMAT,
        "volumes": len(records),
        "failed": dict(sorted(failures.items())),
        "counts": {
            key: _counts(row[key] for row in rows)
            for key in ("kvp", "kernel", "manufacturer", "contrast_phase", "contrast_noted", "matrix")
        },
        "distributions": {key: _distribution(row[key] for row in rows) for key in _DISTRIBUTIONS},
        "hu_histogram": {
            "edges_hu": HISTOGRAM_EDGES_HU,
            "mean_share": [round(float(share), 6) for share in histogram],
        },
        "most_common_combinations": [
            {**dict(zip(COMBINATION, combination, strict=True)), "volumes": count}
            for combination, count in sorted(combinations.items(), key=lambda item: (-item[1], item[0]))[:_MOST_COMMON]
        ],
        "flags": _counts(flag for row in rows for flag in row["flags"]),
        "by_volume": {
            name: {key: value for key, value in record.items() if key not in ("hu_histogram", "outputs")}
            for name, record in records.items()
        },
    }


def _derived(record: dict[str, Any]) -> dict[str, Any]:
    depth, height, width = record["shape_dhw"]
    spacing = record["spacing_dhw_mm"]
    return {
        "matrix": f"{width}×{height}",
        "depth_vox": depth,
        "depth_mm": record["extent_dhw_mm"][0],
        # scanners state spacings to some micrometres; a hundredth of a millimetre is one setting
        "slice_spacing_mm": round(spacing[0], 2),
        "pixel_spacing_mm": round(spacing[2], 3),
    }


def _stated(value: Any) -> Any:
    if value is None:
        return NOT_STATED
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else value


def _counts(values: Iterable[Any]) -> dict[str, int]:
    """Volumes by value, the most frequent first."""
    counted = Counter(str(_stated(value)) for value in values)
    return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))


def _distribution(values: Iterable[float | None]) -> dict[str, float]:
    """Number, mean and percentiles of what is known."""
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    if known.size == 0:
        return {"volumes": 0}
    percentiles = {
        f"p{percent}": round(float(value), 3)
        for percent, value in zip(_PERCENTILES, np.percentile(known, _PERCENTILES), strict=True)
    }
    return {"volumes": int(known.size), "mean": round(float(known.mean()), 3), **percentiles}
