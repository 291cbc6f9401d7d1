"""Is a generated volume that of its patient, or of any patient? Its distance to the own CT beside that to all others'.

A volume may beat the mean of the training and still show nobody in particular. Whole volumes are compared, as small
pictures of themselves on one grid, so that every drawn volume can be compared with every CT of a cohort.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dataset.intensity import HUWindow
from errors import InputError

# Cells of a thumbnail, [D, H, W]: some 13 mm of a chest in plane, well above noise and well below differences between
# patients; 32 kB each.
THUMBNAIL_DHW = (16, 24, 24)


def thumbnail(hu: np.ndarray, window: HUWindow) -> np.ndarray:
    """Mean of each cell of (D, H, W) HU on the window, float32 in [0, 1] of `THUMBNAIL_DHW`, whatever the size."""
    unit = window.to_unit(torch.from_numpy(np.ascontiguousarray(hu, dtype=np.float32)))
    return torch.nn.functional.adaptive_avg_pool3d(unit[None], THUMBNAIL_DHW)[0].numpy()


def retrieval_ranks(drawn: Sequence[np.ndarray], truths: Sequence[np.ndarray]) -> list[float]:
    """Which place the own CT takes among all, by mean squared error: 1 is the nearest; ties share their mean place.

    Args:
        drawn: thumbnails of generated volumes.
        truths: thumbnails of the CTs, in the same order.

    Raises:
        InputError: another number of volumes than of CTs.
    """
    if len(drawn) != len(truths):
        raise InputError(f"{len(drawn)} generated volumes, {len(truths)} CTs: give one CT for each")
    known = np.stack([truth.ravel() for truth in truths]).astype(np.float64)  # (N, cells)
    ranks = []
    for number, volume in enumerate(drawn):
        errors = np.square(known - volume.ravel()).mean(1)  # (N,)
        nearer, equal = (errors < errors[number]).sum(), (errors == errors[number]).sum() - 1
        ranks.append(float(1 + nearer + equal / 2))
    return ranks


def add_retrieval(reports: dict[str, dict[str, Any]], thumbnails: dict[str, dict[str, np.ndarray]]) -> None:
    """Add ``retrieval`` to the reports of the patients of whom there are thumbnails; nothing for fewer than two.

    Args:
        reports: of `evaluation.metrics.generation.case_report`, by patient.
        thumbnails: ``truth``, ``right`` and ``shuffled`` by patient.
    """
    names = [name for name in reports if name in thumbnails]
    if len(names) < 2:
        return
    truths = [thumbnails[name]["truth"] for name in names]
    right, shuffled = (
        retrieval_ranks([thumbnails[name][role] for name in names], truths) for role in ("right", "shuffled")
    )
    for name, rank, other in zip(names, right, shuffled, strict=True):
        reports[name]["retrieval"] = {"nearest": float(rank == 1), "nearest_shuffled": float(other == 1), "rank": rank}
