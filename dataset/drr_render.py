"""Cone-beam radiographs of a CT volume, rendered by nanodrr from this project's geometry.

Reference: nanodrr 0.1.7, https://github.com/eigenvivek/nanodrr; Gopalakrishnan and Golland, "Fast Auto-Differentiable
Digitally Reconstructed Radiographs for Solving Inverse Problems in Intraoperative Imaging", CLIP 2022.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dataset.body import Body
from dataset.projection import (
    SOURCE_DETECTOR_MM,
    ConeGeometry,
    View,
    attenuation_per_mm,
    beam_direction,
    cone_geometry,
    voxel_to_world,
    world_to_voxel,
)
from errors import ConfigurationError, InputError

# Samples along a ray are this far apart: half a voxel of a 2 mm volume, finer than the slices of a native grid.
STEP_MM = 1.0
# Sample points in memory at a time; each takes some 40 bytes.
_POINTS = 4_000_000
_MIN_ROWS = 16


@dataclass(frozen=True)
class Stand:
    """The X-ray stand: a detector of width × width, cut to the rows that see the volume from front to back.

    Args:
        columns: pixels across the detector.
        field_mm: its width and greatest height (a cassette has 430 mm).
        source_detector_mm: source to detector.
        gap_mm: between the body and the detector (its housing and the grid). How much the chest is magnified depends
            on this gap and on the patient, by about 10 % in a frontal picture and 15 % in a lateral one.
    """

    columns: int = 512
    field_mm: float = 430.0
    source_detector_mm: float = SOURCE_DETECTOR_MM
    gap_mm: float = 50.0

    def __post_init__(self) -> None:
        if not _MIN_ROWS <= self.columns <= 4096:
            raise ConfigurationError(f"--size {self.columns}: give {_MIN_ROWS} to 4096 pixels")
        if not (math.isfinite(self.field_mm) and self.field_mm > 0):
            raise ConfigurationError(f"--field-mm {self.field_mm}: give the width of the detector in mm")
        if not (self.gap_mm >= 0 and self.gap_mm < self.source_detector_mm < math.inf):
            raise ConfigurationError(
                f"--gap-mm {self.gap_mm}: give at least 0 and less than --source-detector-mm {self.source_detector_mm}"
            )

    @property
    def pixel_mm(self) -> float:
        """Pixel spacing on the detector."""
        return self.field_mm / self.columns


def fit_geometry(body: Body, affine: np.ndarray, stand: Stand, view: View) -> tuple[ConeGeometry, np.ndarray]:
    """Put a patient on the stand, the middle of the body at the isocentre.

    Rows whose rays leave the volume through its first or last slice before they have left the body are cut off: they
    would show a patient who fades out. A cone beam costs about a centimetre of a whole chest at either end.

    Returns:
        The geometry and the isocentre (3,) in RAS+ mm.

    Raises:
        InputError: the volume is so flat that hardly a row remains.
    """
    (low, high), shape = np.asarray(body.bounding_box_vox, dtype=np.float64) - 0.5, body.hu.shape
    corners = _corners(low, high, affine)
    isocentre = voxel_to_world((low + high) / 2, affine)
    thickness_mm = float(np.ptp(corners @ beam_direction(view)))
    source_isocentre_mm = stand.source_detector_mm - stand.gap_mm - thickness_mm / 2
    if source_isocentre_mm <= thickness_mm / 2:
        raise ConfigurationError(
            f"a body of {thickness_mm:.0f} mm and a gap of {stand.gap_mm:.0f} mm do not fit before the detector: "
            "raise --source-detector-mm"
        )
    whole = cone_geometry(
        view,
        isocentre.tolist(),
        (stand.columns, stand.columns),
        stand.pixel_mm,
        source_detector_mm=stand.source_detector_mm,
        source_isocentre_mm=source_isocentre_mm,
    )
    depths = (corners - whole.source_mm) @ whole.normal
    columns = np.clip(whole.project(corners)[:, 1], -0.5, stand.columns - 0.5)
    rows = np.arange(stand.columns)
    seen = np.ones(stand.columns, dtype=bool)
    for column in (columns.min(), columns.mean(), columns.max()):
        paths = (whole.pixel_mm(rows, column) - whole.source_mm) / whole.source_detector_mm
        for depth in (depths.min(), depths.max()):
            slices = world_to_voxel(whole.source_mm + depth * paths, affine)[:, 0]
            seen &= (slices >= -0.5) & (slices <= shape[0] - 0.5)
    kept = np.flatnonzero(seen)
    if len(kept) < _MIN_ROWS:
        raise InputError(
            f"the volume covers {len(kept)} rows of a {view} radiograph, {_MIN_ROWS} are needed: it has too few slices "
            "for a projection"
        )
    return whole.rows(int(kept[0]), int(kept[-1]) + 1), isocentre


@torch.inference_mode()
def render(body: Body, affine: np.ndarray, geometry: ConeGeometry) -> np.ndarray:
    """Line integrals of attenuation, float32 (rows, columns): -log of the transmitted share of the beam.

    Args:
        body: the patient without the couch.
        affine: (4, 4) of ``body.hu``.
        geometry: of the picture.
    """
    from nanodrr.data import Subject
    from nanodrr.drr import render as nanodrr_render

    # outside the bounding box there is only air: a smaller box means finer samples for the same work
    first, last = (np.array(corner) for corner in body.bounding_box_vox)
    first, last = np.maximum(first - 1, 0), np.minimum(last + 1, body.hu.shape)
    hu = np.ascontiguousarray(body.hu[tuple(slice(a, b) for a, b in zip(first, last, strict=True))])
    box_affine = affine.copy()
    box_affine[:3, 3] = voxel_to_world(first, affine)

    attenuation = attenuation_per_mm(torch.from_numpy(hu))[None, None]
    to_world = torch.from_numpy(box_affine[:, [2, 1, 0, 3]])  # nanodrr's voxels are (x, y, z) = (w, h, d)
    subject = Subject(
        attenuation,
        torch.zeros(1, 1, 1, 1, 1),
        to_world.float(),
        torch.linalg.inv(to_world).float(),
        Subject._make_voxel_to_grid(attenuation.shape),
        torch.zeros(3),
        max_label=0,
        convert_to_mu=False,
    )
    # the camera stands at the source; its axes are the picture's columns and rows and the beam
    camera_to_world = np.eye(4)
    camera_to_world[:3, 0] = geometry.column_step_mm / np.linalg.norm(geometry.column_step_mm)
    camera_to_world[:3, 1] = geometry.row_step_mm / np.linalg.norm(geometry.row_step_mm)
    camera_to_world[:3, 2] = geometry.normal
    camera_to_world[:3, 3] = geometry.source_mm
    rt_inv = torch.from_numpy(camera_to_world)[None].float()

    rows, columns = geometry.shape
    row_grid, column_grid = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    targets = (geometry.pixel_mm(row_grid, column_grid) - geometry.source_mm) @ camera_to_world[:3, :3]
    target = torch.from_numpy(targets).float()
    distance = torch.tensor([geometry.source_detector_mm])
    # no ray is longer inside the box than the box is thick along the beam, over the cosine of its obliquity
    depths = _corners(np.zeros(3) - 0.5, np.asarray(hu.shape) - 0.5, box_affine) @ geometry.normal
    obliquity = float(target.norm(dim=-1).max()) / geometry.source_detector_mm
    samples = max(2, math.ceil(float(np.ptp(depths)) * obliquity / STEP_MM))
    rows_at_once = max(1, _POINTS // (samples * columns))
    bands: list[Any] = []
    for row in range(0, rows, rows_at_once):
        band = target[row : row + rows_at_once]
        picture = nanodrr_render(
            subject,
            torch.eye(3)[None],
            rt_inv,
            distance,
            band.shape[0],
            columns,
            samples,
            src=torch.zeros(1, 1, 3),
            tgt=band.reshape(1, -1, 3),
            backend="torch",
        )
        bands.append(picture[0, 0].numpy())
    return np.concatenate(bands)


def _corners(low: np.ndarray, high: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """The eight corners (8, 3) of a box of voxels, in RAS+ mm."""
    return voxel_to_world(np.array(list(itertools.product(*zip(low, high, strict=True)))), affine)
