"""Does a volume agree with its radiograph, and is it the right way round?

A generated volume is projected again and compared with the radiograph it was made from, or with the projection of the
true volume, by normalised cross-correlation (NCC), which is blind to gain and offset: pictures in any unit compare.
Chests look alike, so an NCC means nothing by itself; it is read beside that of a shuffled radiograph, and beside that
of the mirrored picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from dataset.body import Body
from dataset.drr_render import render
from dataset.projection import ConeGeometry, View, project_parallel
from errors import InputError

# A ray that passes less than this (about 10 mm of water at 70 keV) has missed the body.
_BODY_INTEGRAL = 0.2


def ncc(first: np.ndarray, second: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Normalised cross-correlation (Pearson's r over pixels) of two pictures or volumes of one shape.

    Args:
        first: any shape and unit.
        second: the same shape.
        mask: bool, the same shape: pixels that count.

    Returns:
        In [-1, 1]; NaN where one is constant, holds NaN, or fewer than two pixels count.

    Raises:
        InputError: the shapes differ.
    """
    if first.shape != second.shape or (mask is not None and mask.shape != first.shape):
        raise InputError(f"pictures {list(first.shape)} and {list(second.shape)}: NCC needs one grid")
    a, b = (np.asarray(values, dtype=np.float64) for values in (first, second))
    a, b = (a.ravel(), b.ravel()) if mask is None else (a[mask], b[mask])
    if a.size < 2:
        return math.nan
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    # NaN anywhere makes the scale NaN, and the comparison false
    return float(np.clip(a @ b / scale, -1.0, 1.0)) if scale > 1e-12 * a.size else math.nan


def radiograph(hu: np.ndarray, spacing_mm: Sequence[float], view: View = "frontal") -> np.ndarray:
    """Parallel-beam line integrals (`project_parallel`) of (D, H, W) HU as float32 (rows, columns)."""
    return project_parallel(torch.from_numpy(np.ascontiguousarray(hu, dtype=np.float32)), spacing_mm, view).numpy()


def projection_ncc(
    generated_hu: np.ndarray, true_hu: np.ndarray, spacing_mm: Sequence[float], view: View = "frontal"
) -> dict[str, float]:
    """NCC of the projections of two volumes.

    Args:
        generated_hu: (D, H, W) HU.
        true_hu: the same shape.
        spacing_mm: of both, (d, h, w).
        view: "frontal" or "lateral".

    Returns:
        ``drr_ncc`` over the whole picture, in which the outline of the body weighs most, and ``drr_ncc_body`` over the
        pixels where the truth shows the body, in which it does not count.

    Raises:
        InputError: the shapes differ.
    """
    generated, true = (radiograph(hu, spacing_mm, view) for hu in (generated_hu, true_hu))
    return {"drr_ncc": ncc(generated, true), "drr_ncc_body": ncc(generated, true, true > _BODY_INTEGRAL)}


def chirality(generated_hu: np.ndarray, true_radiograph: np.ndarray, spacing_mm: Sequence[float]) -> float:
    """How much better a volume's frontal projection fits the radiograph than the mirrored radiograph, as NCC.

    Positive: the right way round (the heart on the patient's left). Zero: symmetric, or undecided. Negative: mirrored.

    Args:
        generated_hu: (D, H, W) HU.
        true_radiograph: frontal (D, W), patient's left on the right, for instance `radiograph` of the truth.
        spacing_mm: of the volume.

    Raises:
        InputError: the radiograph is not on the volume's (D, W) grid.
    """
    projected = radiograph(generated_hu, spacing_mm)
    return ncc(projected, true_radiograph) - ncc(projected, true_radiograph[:, ::-1])


def mirror(volume: np.ndarray) -> np.ndarray:
    """Left and right exchanged: (..., W) reversed along its last axis; a volume, or a frontal picture."""
    return volume[..., ::-1]


def cone_ncc(
    generated_hu: np.ndarray,
    affine: np.ndarray,
    line_integrals: np.ndarray,
    geometry: ConeGeometry,
    *,
    step: int = 4,
) -> float:
    """NCC of a volume's cone-beam projection with the rendered radiograph that it was made from.

    Args:
        generated_hu: (D, H, W) HU.
        affine: (4, 4).
        line_integrals: the radiograph, of `dataset.xray_drr.read_line_integrals`.
        geometry: where its source and detector stood.
        step: every so many pixels are compared, along rows and columns.

    Returns:
        NCC, NaN where the volume holds NaN.

    Raises:
        InputError: the picture and its geometry differ in size.
    """
    if line_integrals.shape != geometry.shape:
        raise InputError(f"radiograph {list(line_integrals.shape)} and geometry {list(geometry.shape)}: they differ")
    if not np.isfinite(generated_hu).all():
        return math.nan
    picture = line_integrals[::step, ::step]
    coarse = replace(
        geometry,
        row_step_mm=geometry.row_step_mm * step,
        column_step_mm=geometry.column_step_mm * step,
        shape=(int(picture.shape[0]), int(picture.shape[1])),
    )
    everything = Body(np.asarray(generated_hu, dtype=np.float32), ((0, 0, 0), _triple(generated_hu.shape)), 0)
    return ncc(render(everything, np.asarray(affine, dtype=np.float64), coarse), picture)


def _triple(shape: tuple[int, ...]) -> tuple[int, int, int]:
    d, h, w = shape
    return d, h, w
