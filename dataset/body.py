"""Where the body is in a CT: for samplers that prefer it to air, for statistics, and for radiographs without a couch.

There is one definition. Soft tissue is what exceeds -500 HU; shells of a few millimetres (couch top, tubes, blankets)
are worn away, the largest piece of the rest is the patient, grown back along its tissue; lungs, airways and bowel gas
that tissue encloses within an axial slice belong to it.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from dataset.geometry import spacing_mm
from dataset.store import LazyHU
from errors import InputError
from params import HU_AIR

# Between aerated lung (-850) with its vessels and fat (-100): the usual threshold of body masks.
TISSUE_HU = -500
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
# The map for samplers: some 40 cells along each axis, about 10 mm of a chest.
CELLS = 40
MAX_CELL_VOX = 16
# The body is found on a grid of about this spacing: fine enough for skin, 20 times cheaper than a native grid.
_COARSE_MM = 2.0
# Shells thinner than twice this are not body. On coarser grids they have faded below the threshold.
_SHELL_MM = 2.0
# What is worn away with them (skin, thin chest walls) is found again this far along the tissue.
_REGROWTH_MM = 24.0
# Slices in which a gap in the chest wall keeps the lungs from being filled are bridged by those above and below.
_BRIDGE_MM = 20.0
_SLAB = 32
_IN_PLANE = np.zeros((3, 3, 3), dtype=bool)
_IN_PLANE[1, 1, :] = _IN_PLANE[1, :, 1] = True


@dataclass(frozen=True)
class Body:
    """A volume with air outside the body.

    Args:
        hu: int16 (D, H, W); a copy, cropped to nothing.
        bounding_box_vox: first and last (exclusive) index (d, h, w) of the body.
        removed_voxels: how many were set to air that were not air before (couch, clothes, cables).
    """

    hu: np.ndarray
    bounding_box_vox: tuple[tuple[int, int, int], tuple[int, int, int]]
    removed_voxels: int


def isolate_body(hu: np.ndarray, affine: np.ndarray) -> Body:
    """Set everything outside the body to air; lungs and bowel gas inside it stay.

    Args:
        hu: int16 (D, H, W).
        affine: (4, 4).

    Raises:
        InputError: there is no tissue.
    """
    mask = body_mask(hu, affine)
    air = np.int16(HU_AIR)
    removed = int(np.count_nonzero(~mask & (hu > air + 100)))  # noise of air is not counted
    occupied = [np.flatnonzero(line) for line in _occupied(mask)]
    first, last = (int(line[0]) for line in occupied), (int(line[-1]) + 1 for line in occupied)
    box = (tuple(first), tuple(last))
    return Body(np.where(mask, hu, air), box, removed)  # type: ignore[arg-type]


def body_mask(hu: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """The body as bool (D, H, W), on a grid of 2 mm and as much generous at the skin.

    Where tissue is cut by all four sides of the field of view there is no outside, and everything is body.

    Raises:
        InputError: there is no tissue.
    """
    coarse = _find(hu, spacing_mm(affine))
    if not coarse.body.any():
        raise InputError(f"no body: no tissue above {TISSUE_HU} HU: check that the volume is a CT in HU")
    body = _widened(coarse.body, [0, 1, 1])  # what the coarse grid missed of the skin
    indices = [
        np.minimum(np.arange(n) // step, length - 1)
        for n, step, length in zip(hu.shape, coarse.steps, body.shape, strict=True)
    ]
    return np.asarray(body[np.ix_(*indices)])


def body_metadata(hu: np.ndarray | LazyHU, affine: np.ndarray) -> dict[str, Any]:
    """The entry ``body`` of a store's metadata: bounding box, shares, HU percentiles, and a coarse map.

    Args:
        hu: (D, H, W) int16; a store's voxels are read slab by slab.
        affine: (4, 4).

    Returns:
        JSON-able: ``bounding_box_vox`` ``[[d0, h0, w0], [d1, h1, w1]]``, half open, of the body with all its voxels;
        ``share_body`` = ``share_tissue`` + ``share_lung`` (enclosed, below the threshold) and ``share_air``, of all
        voxels; ``hu_percentiles`` of the body, empty without one; ``map`` with ``cell_vox``, ``cells`` (the grid) and
        ``bits`` (packed, zlib, base64), which `dataset.patch_sampling.read_body` reads. A volume without tissue has
        shares of 0, the whole volume as its box, and a map that is body everywhere.
    """
    coarse = _find(hu, spacing_mm(affine))
    values = coarse.hu[coarse.body]
    share_body = round(float(coarse.body.mean()), 6)
    share_lung = round(float((coarse.body & (coarse.hu <= TISSUE_HU)).mean()), 6)
    return {
        "bounding_box_vox": _box(coarse, hu.shape),
        "share_body": share_body,
        "share_tissue": round(share_body - share_lung, 6),
        "share_lung": share_lung,
        "share_air": round(1 - share_body, 6),
        "hu_percentiles": {
            str(percent): int(value)
            for percent, value in zip(PERCENTILES, np.percentile(values, PERCENTILES, method="nearest"), strict=True)
        }
        if values.size
        else {},
        "map": _map(coarse, hu.shape),
    }


@dataclass(frozen=True)
class _Coarse:
    """Every n-th voxel: its HU, whether it is body, and n along (d, h, w); sample i lies at n i + n // 2."""

    hu: np.ndarray
    body: np.ndarray
    steps: list[int]


def _find(hu: np.ndarray | LazyHU, mm: Sequence[float]) -> _Coarse:
    steps = [max(1, min(round(_COARSE_MM / step), _cell(size))) for step, size in zip(mm, hu.shape, strict=True)]
    samples = []
    for first in range(0, hu.shape[0], _SLAB):
        inside = (steps[0] // 2 - first) % steps[0]
        samples.append(
            np.asarray(hu[first : first + _SLAB])[
                inside :: steps[0], steps[1] // 2 :: steps[1], steps[2] // 2 :: steps[2]
            ]
        )
    coarse = np.concatenate(samples)
    tissue = coarse > TISSUE_HU
    grid_mm = [step * n for step, n in zip(mm, steps, strict=True)]
    # in plane only: thick slices must not wear away the top and bottom of a scan
    reach = [0, *(round(_SHELL_MM / step_mm) for step_mm in grid_mm[1:])]
    # the border counts as body, since a small field of view cuts through it
    seeds = ~_widened(~tissue, reach)
    labels, count = ndimage.label(seeds if seeds.any() else tissue)
    if count == 0:
        return _Coarse(coarse, tissue, steps)
    body = labels == int(np.argmax(np.bincount(labels.ravel())[1:])) + 1
    if all(edge.any() for edge in (body[:, 0], body[:, -1], body[:, :, 0], body[:, :, -1])):
        return _Coarse(coarse, np.ones_like(body), steps)
    back = [0, *(max(1, n) for n in reach[1:])]
    for _ in range(max(1, round(_REGROWTH_MM / (min(back[1:]) * min(grid_mm[1:]))))):
        body = _widened(body, back) & tissue
    body = _with_enclosed(body)
    return _Coarse(coarse, _bridged(body, round(_BRIDGE_MM / grid_mm[0]) // 2), steps)


def _widened(mask: np.ndarray, reach: Sequence[int]) -> np.ndarray:
    """Dilation by a box that reaches so far along each axis; nothing comes in from outside."""
    # shifted copies: twenty times faster than ndimage's dilation
    for axis, length in enumerate(reach):
        source = np.moveaxis(mask, axis, 0)
        out = mask.copy()
        target = np.moveaxis(out, axis, 0)
        for shift in range(1, min(length, len(source) - 1) + 1):
            target[shift:] |= source[:-shift]
            target[:-shift] |= source[shift:]
        mask = out
    return mask


def _with_enclosed(tissue: np.ndarray) -> np.ndarray:
    """Tissue, and what it surrounds within its axial slice: what is not connected to the slice's edge."""
    labels, count = ndimage.label(~tissue, structure=_IN_PLANE)
    is_inside = np.ones(count + 1, dtype=bool)
    for edge in (labels[:, 0], labels[:, -1], labels[:, :, 0], labels[:, :, -1]):
        is_inside[np.unique(edge)] = False
    is_inside[0] = True  # tissue itself
    return np.asarray(is_inside[labels])


def _bridged(body: np.ndarray, reach: int) -> np.ndarray:
    """Close gaps along D of up to twice ``reach`` slices; the ends of the scan stay as they are."""
    if reach < 1:
        return body
    # margins, so that nothing is worn away at the ends
    grown = _widened(np.pad(body, [(2 * reach, 2 * reach), (0, 0), (0, 0)]), (reach, 0, 0))
    return np.asarray(~_widened(~grown, (reach, 0, 0))[2 * reach : -2 * reach] | body)


def _occupied(mask: np.ndarray) -> list[np.ndarray]:
    """For each axis, bool by index: whether there is body."""
    planes = np.asarray(mask.any(axis=0))
    return [np.asarray(mask.any(axis=(1, 2))), np.asarray(planes.any(axis=1)), np.asarray(planes.any(axis=0))]


def _box(coarse: _Coarse, shape: Sequence[int]) -> list[list[int]]:
    if not coarse.body.any():
        return [[0, 0, 0], [int(size) for size in shape]]
    low, high = [], []
    for line, step, size in zip(_occupied(coarse.body), coarse.steps, shape, strict=True):
        hit = np.flatnonzero(line)
        # a sample stands for the voxels up to its neighbours, which are not body
        low.append(max(0, int(hit[0]) * step + step // 2 - (step - 1)))
        high.append(min(size, int(hit[-1]) * step + step // 2 + step))
    return [low, high]


def _cell(size: int) -> int:
    return min(MAX_CELL_VOX, math.ceil(size / CELLS))


def _map(coarse: _Coarse, shape: Sequence[int]) -> dict[str, Any]:
    """Cells of which at least half is body."""
    cell = [_cell(size) for size in shape]
    grid = [math.ceil(size / length) for size, length in zip(shape, cell, strict=True)]
    shares = coarse.body.astype(np.float64)
    for axis, (count, length, step) in enumerate(zip(grid, cell, coarse.steps, strict=True)):
        # each whole cell holds a sample; one that the volume cuts short may take its neighbour's last
        samples = shares.shape[axis]
        starts = np.minimum(
            np.searchsorted(np.arange(samples) * step + step // 2, np.arange(count) * length), samples - 1
        )
        numbers = np.maximum(np.diff(np.append(starts, samples)), 1)
        shares = np.add.reduceat(shares, starts, axis=axis) / np.expand_dims(
            numbers, [n for n in range(3) if n != axis]
        )
    body = shares >= 0.5 if (shares >= 0.5).any() else shares > 0
    if not body.any():
        body = np.ones(grid, dtype=bool)
    bits = zlib.compress(np.packbits(body).tobytes(), 9)
    return {"cell_vox": cell, "cells": grid, "bits": base64.b64encode(bits).decode()}
