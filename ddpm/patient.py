"""What a model is told of a patient, and where the volume lies that it shall draw.

A radiograph that was rendered from a CT brings its geometry: the volume lies in that CT's world, on its field of view,
and rays are the picture's own. Of a real radiograph nobody knows where the patient stood: the field is the training
cohort's (its cells, its mean spacing), centred on the world's origin, upright in RAS+ mm, and rays run along the axis
(`dataset.ray_grid`). The scale is the file's pixel spacing over the magnification of a chest stand where the spacing
makes the picture as large as a chest radiograph can be; else the picture covers the field.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from dataset.geometry import affine_after_crop, resampled_affine
from dataset.projection import View
from dataset.ray_grid import believed_spacing_mm, ray_grid, rendered_info
from dataset.xray import XRay, load_xray
from dataset.xray_drr import DRRInfo
from ddpm.bundle import Bundle
from ddpm.conditions import UNKNOWN_LABEL, ConditionBatch
from errors import ConfigurationError, InputError

_OUTSIDE = 2.0  # on the grid of rays: outside the picture


@dataclass(frozen=True)
class Patient:
    """What is known of one patient, as the model takes it.

    Attributes:
        conditions: a batch of one.
        affine: (4, 4) of the volume, (d, h, w, 1) -> RAS+ mm.
        facts: JSON-able, for provenance; no name, no path, no text.
    """

    conditions: ConditionBatch
    affine: np.ndarray
    facts: dict[str, Any]


def prepare_patient(bundle: Bundle, xrays: Sequence[XRay], text: str = "", label: int | None = None) -> Patient:
    """Put the radiographs of one patient into the form that the model was trained on.

    Args:
        bundle: whose model shall see them.
        xrays: one for each view at most; one that does not tell its view takes the first free place.
        text: report, "" for none.
        label: 1 for an embolism, 0 for none, None where nobody said.

    Raises:
        InputError: a view that the model does not take or has already, views rendered from different CTs, or a file
            that changed since it was loaded.
        ConfigurationError: no radiograph, or a text or label for a model that was not trained with any.
    """
    told = bundle.config.conditioner
    if not xrays:
        raise ConfigurationError("no radiograph: give one")
    refuse_untrained(bundle, text=bool(text), label=label)
    placed = _by_view(xrays, cast("tuple[View, ...]", told.views))
    infos = {view: rendered_info(xray) for view, xray in placed.items()}
    affine, origin = _field(bundle, infos)
    images, grids, present, facts = [], [], [], []
    for view in cast("tuple[View, ...]", told.views):
        if view not in placed:
            images.append(torch.zeros(1, told.xray_size, told.xray_size))
            grids.append(torch.full((*bundle.config.latent_dhw, 2), _OUTSIDE))
            present.append(False)
            continue
        xray = placed[view]
        if xray.image.shape[-1] != told.xray_size:
            xray = load_xray(xray.source, told.xray_size, view=view)
        info = infos[view]
        if info is not None:
            scale = "rays of the rendered picture"
        elif believed_spacing_mm(xray) is not None:
            scale = "pixel spacing of the file"
        else:
            scale = "the picture covers the field"
        grid = ray_grid(
            None if info is None else info.geometry, view, xray, affine, bundle.shape_dhw, bundle.config.stride_dhw
        )
        digest = hashlib.sha256(xray.image.numpy().tobytes() + grid.tobytes()).hexdigest()
        images.append(xray.image)
        grids.append(torch.from_numpy(grid))
        present.append(True)
        facts.append({"view": view, "scale": scale, "sha256": digest})
    conditions = ConditionBatch(
        torch.stack(images)[None],
        torch.tensor([present]),
        torch.stack(grids)[None],
        torch.tensor([UNKNOWN_LABEL if label is None else label]),
        (text,),
    )
    known_text = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest() if text else None
    return Patient(conditions, affine, {"xrays": facts, "field": origin, "text_sha256": known_text, "label": label})


def refuse_untrained(bundle: Bundle, *, text: bool, label: int | None) -> None:
    """What a model was trained without, it cannot be told.

    Args:
        bundle: whose model shall be told.
        text: a report is given.
        label: as `prepare_patient` takes it.

    Raises:
        ConfigurationError: a text or label for a model that was not trained with any, or a label that is none.
    """
    told = bundle.config.conditioner
    if text and told.text == "none":
        raise ConfigurationError("a text is given, but this model was trained without reports: leave it out")
    if label is not None and (not told.label or label not in (0, 1)):
        known = "give 0, 1 or none" if told.label else "this model was trained without labels: leave it out"
        raise ConfigurationError(f"label={label}: {known}")


def _by_view(xrays: Sequence[XRay], views: tuple[View, ...]) -> dict[View, XRay]:
    """Each radiograph at its place.

    Raises:
        InputError: there is none for it.
    """
    placed: dict[View, XRay] = {}
    for xray in sorted(xrays, key=lambda xray: xray.view == "unknown"):  # those that tell their view choose first
        free = [view for view in views if view not in placed]
        if xray.view != "unknown" and xray.view not in views:
            raise InputError(
                f"{xray.source}: a {xray.view} radiograph, this model takes {' and '.join(views)} ones: give that one"
            )
        view = next((view for view in free if xray.view in (view, "unknown")), None)
        if view is None:
            raise InputError(f"{xray.source}: a second {xray.view} radiograph: give each view once")
        placed[view] = xray
    return placed


def _field(bundle: Bundle, infos: dict[View, DRRInfo | None]) -> tuple[np.ndarray, str]:
    """The affine (4, 4) of the volume, and what decided it."""
    rendered = [info for info in infos.values() if info is not None]
    if not rendered:
        d, h, w = bundle.config.spacing_mm[0]
        upright = np.array([[0, 0, -w, 0], [0, -h, 0, 0], [d, 0, 0, 0], [0, 0, 0, 1]])  # d to the head, h back, w left
        middle = (np.array(bundle.shape_dhw) - 1) / 2
        return affine_after_crop(upright, (-middle).tolist()), "mean of the training volumes, centred"
    first = rendered[0]
    for other in rendered[1:]:
        if other.shape_dhw != first.shape_dhw or not np.allclose(other.affine, first.affine, atol=1e-3):
            raise InputError("the radiographs were rendered from different CTs: give those of one patient")
    # as training volumes were: the whole field of the CT on the cells of the model
    return resampled_affine(first.affine, first.shape_dhw, bundle.shape_dhw), "that of the CT of the rendered picture"


def joined(batches: Sequence[ConditionBatch]) -> ConditionBatch:
    """Several batches as one."""
    extras = [batch.extra for batch in batches if batch.extra is not None]
    return ConditionBatch(
        torch.cat([batch.xray for batch in batches]),
        torch.cat([batch.xray_present for batch in batches]),
        torch.cat([batch.ray_grid for batch in batches]),
        torch.cat([batch.label for batch in batches]),
        tuple(text for batch in batches for text in batch.text),
        torch.cat(extras) if extras else None,
    )
