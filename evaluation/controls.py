"""What a model may be told of a patient: the truth, or a control that shows what it makes of the radiograph."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch

from ddpm.conditions import UNKNOWN_LABEL, ConditionBatch

# Beyond [-1, 1] a cell lies outside the picture (see `ConditionBatch.ray_grid`).
_OUTSIDE = 2.0


def told(batch: ConditionBatch, tell: Collection[str] = ()) -> ConditionBatch:
    """The same radiographs; report and label, which carry the diagnosis past them, only where ``tell`` names them."""
    label = batch.label if "label" in tell else torch.full_like(batch.label, UNKNOWN_LABEL)
    return replace(batch, label=label, text=batch.text if "report" in tell else ("",) * len(batch.text))


def with_xrays_of(batch: ConditionBatch, other: ConditionBatch) -> ConditionBatch:
    """The same patient with another's radiographs; their rays come along, since they belong to the pictures."""
    return replace(batch, xray=other.xray, xray_present=other.xray_present, ray_grid=other.ray_grid)


def without_conditions(batch: ConditionBatch) -> ConditionBatch:
    """The same patient, of whom nothing is known; position and context of a crop stay."""
    return replace(
        batch,
        xray=torch.zeros_like(batch.xray),
        xray_present=torch.zeros_like(batch.xray_present),
        ray_grid=torch.full_like(batch.ray_grid, _OUTSIDE),
        label=torch.full_like(batch.label, UNKNOWN_LABEL),
        text=("",) * len(batch.text),
    )


def mirrored(batch: ConditionBatch, views: Sequence[str]) -> ConditionBatch:
    """The patient's mirror image, as far as a model is told of it: picture, rays and the place of a crop change sides.

    Only frontal pictures are mirrored by it. A lateral one is taken away: the mirrored patient's would be seen from the
    other side, at another magnification. The context of a crop changes sides cell by cell, nearly as if the
    mirrored patient had been encoded: no codec is quite symmetric.

    Args:
        batch: of patients; where `shows_sides` says no, what is drawn from the result tells nothing.
        views: of the V radiographs in it, in its order.
    """
    frontal = torch.tensor([view == "frontal" for view in views[: batch.xray.shape[1]]])
    rays = batch.ray_grid.flip(4)  # (B, V, d, h, w, 2)
    rays[..., 0] = -rays[..., 0]
    extra = batch.extra
    if extra is not None:
        extra = extra.flip(4)  # (B, 3 + C, d, h, w): places along d, h and w in the whole field, then its context
        extra[:, 2] = -extra[:, 2]
    present = batch.xray_present & frontal.to(batch.xray_present.device)
    return replace(batch, xray=batch.xray.flip(-1), xray_present=present, ray_grid=rays, extra=extra)


def shows_sides(batch: ConditionBatch, views: Sequence[str]) -> bool:
    """Whether the radiographs are all that tells a model on which side the heart lies, in every patient.

    Not without a frontal one; and not in crops with a low-resolution context, since that is of the true patient.

    Args:
        batch: of patients.
        views: of the V radiographs in it, in its order.
    """
    with_context = batch.extra is not None and batch.extra.shape[1] > 3
    return "frontal" in views and bool(batch.xray_present[:, views.index("frontal")].all()) and not with_context
