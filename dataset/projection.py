"""X-ray projection: what a ray of a radiograph passes on its way through a volume.

Two projectors share one view convention. Parallel beams run along an axis of the standard array (differentiable, for
losses and consistency metrics); a cone beam has a point source and is described here as pure geometry in RAS+ mm,
while `dataset/drr_render.py` renders it.

A frontal picture has the head up and the patient's left on the right, as if one faced the patient: rows run against D,
columns along W. A lateral one has the head up and the chest on the left: rows run against D, columns along H.

Beer-Lambert: the detector sees I = I0 exp(-p) with the line integral p of the attenuation; every picture here is p
itself, which film and digital detectors display, so bones are bright and the picture is linear in the volume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch

from dataset.geometry import checked_affine
from errors import ConfigurationError, InputError
from params import HU_AIR, HU_WATER, MU_WATER_PER_MM

View = Literal["frontal", "lateral"]
VIEWS: tuple[View, ...] = get_args(View)

# RAS+ directions of a picture's columns (to the right), its rows (down) and the beam. Frontal is postero-anterior;
# lateral has the left side at the detector.
_RIGHT = {"frontal": (-1.0, 0.0, 0.0), "lateral": (0.0, -1.0, 0.0)}
_BEAM = {"frontal": (0.0, 1.0, 0.0), "lateral": (-1.0, 0.0, 0.0)}
_DOWN = (0.0, 0.0, -1.0)
# axis of the standard array that a parallel beam runs along
_BEAM_AXIS = {"frontal": 1, "lateral": 2}

# A wall stand: the detector is 1.8 m from the source, the middle of the chest some 17 cm before it, so that it is
# magnified by 1.10.
SOURCE_DETECTOR_MM = 1800.0
SOURCE_ISOCENTRE_MM = 1630.0

_FORMAT = "x-ray2ctpa cone geometry 1"


def attenuation_per_mm(volume_hu: torch.Tensor) -> torch.Tensor:
    """Linear attenuation in 1/mm at 70 keV from HU, any shape: mu = mu_water (1 + HU / 1000), never negative.

    This is the definition of the Hounsfield unit with the attenuation of air neglected; padding below air gives 0.
    """
    return ((volume_hu.float() - HU_AIR) / (HU_WATER - HU_AIR)).clamp(min=0.0) * MU_WATER_PER_MM


def line_integrals(field: torch.Tensor, spacing_mm: Sequence[float], view: View = "frontal") -> torch.Tensor:
    """Integrate along parallel beams; linear and differentiable in ``field``.

    Args:
        field: (..., D, H, W), for instance attenuation in 1/mm.
        spacing_mm: voxel spacing (d, h, w) in mm.
        view: "frontal" along H, "lateral" along W.

    Returns:
        (..., D, W) for frontal and (..., D, H) for lateral, upright, in the unit of ``field`` times mm. Pixels are as
        large as the voxels they look through.

    Raises:
        ConfigurationError: an unknown view or a spacing that is not three positive numbers.
    """
    _require_view(view)
    if field.dim() < 3 or len(spacing_mm) != 3 or not all(step > 0 for step in spacing_mm):
        raise ConfigurationError(
            f"projection of {tuple(field.shape)} at {list(spacing_mm)} mm: (..., D, H, W) is needed"
        )
    axis = _BEAM_AXIS[view]
    return field.sum(dim=axis - 3).mul(float(spacing_mm[axis])).flip(-2)


def project_parallel(volume_hu: torch.Tensor, spacing_mm: Sequence[float], view: View = "frontal") -> torch.Tensor:
    """A parallel-beam radiograph of a volume in HU: the line integral of attenuation; shapes as `line_integrals`."""
    return line_integrals(attenuation_per_mm(volume_hu), spacing_mm, view)


@dataclass(frozen=True)
class Ray:
    """A ray in RAS+ mm.

    Args:
        origin_mm: (3,), the X-ray source.
        direction: (3,), unit length, towards the detector.
        length_mm: from the source to the detector's pixel.
    """

    origin_mm: np.ndarray
    direction: np.ndarray
    length_mm: float

    def at(self, distance_mm: np.ndarray | float) -> np.ndarray:
        """World points (..., 3) at distances from the source."""
        return self.origin_mm + np.asarray(distance_mm, dtype=np.float64)[..., None] * self.direction


@dataclass(frozen=True, eq=False)
class ConeGeometry:
    """Where source and detector stood, in RAS+ mm; pixel (row, column) has its centre at integer numbers.

    Args:
        view: which picture it is.
        source_mm: (3,) the X-ray source.
        first_pixel_mm: (3,) the centre of pixel (0, 0), top left.
        row_step_mm: (3,) from a pixel to the one below it.
        column_step_mm: (3,) from a pixel to its right neighbour.
        shape: (rows, columns).
    """

    view: View
    source_mm: np.ndarray
    first_pixel_mm: np.ndarray
    row_step_mm: np.ndarray
    column_step_mm: np.ndarray
    shape: tuple[int, int]

    @property
    def pixel_spacing_mm(self) -> tuple[float, float]:
        """(row, column) spacing on the detector."""
        return float(np.linalg.norm(self.row_step_mm)), float(np.linalg.norm(self.column_step_mm))

    @cached_property
    def normal(self) -> np.ndarray:
        """(3,) unit vector perpendicular to the detector, away from the source."""
        normal = np.cross(self.row_step_mm, self.column_step_mm)
        normal /= np.linalg.norm(normal)
        return normal * np.sign(normal @ (self.first_pixel_mm - self.source_mm))

    @property
    def source_detector_mm(self) -> float:
        """Distance of the source from the detector's plane."""
        return float(self.normal @ (self.first_pixel_mm - self.source_mm))

    def magnification(self, point_mm: np.ndarray) -> float:
        """How much larger than life something at a world point appears on the detector."""
        return self.source_detector_mm / float(self.normal @ (np.asarray(point_mm, dtype=np.float64) - self.source_mm))

    def pixel_mm(self, row: np.ndarray | float, column: np.ndarray | float) -> np.ndarray:
        """World centre (..., 3) of pixels; fractions are allowed."""
        row = np.asarray(row, dtype=np.float64)[..., None]
        column = np.asarray(column, dtype=np.float64)[..., None]
        return self.first_pixel_mm + row * self.row_step_mm + column * self.column_step_mm

    def project(self, points_mm: np.ndarray) -> np.ndarray:
        """Pixels (..., 2) as (row, column) onto which world points (..., 3) are projected; fractions, also outside."""
        rays = np.asarray(points_mm, dtype=np.float64) - self.source_mm
        on_detector = rays * (self.source_detector_mm / (rays @ self.normal))[..., None]
        steps = np.stack([self.row_step_mm, self.column_step_mm], axis=1)
        return (on_detector - (self.first_pixel_mm - self.source_mm)) @ np.linalg.pinv(steps).T

    def rows(self, first: int, last: int) -> ConeGeometry:
        """The same set-up with only the rows ``first`` to ``last`` (exclusive) of the detector."""
        start = self.pixel_mm(first, 0)
        return ConeGeometry(
            self.view, self.source_mm, start, self.row_step_mm, self.column_step_mm, (last - first, self.shape[1])
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, for `from_dict`."""
        return {
            "format": _FORMAT,
            "view": self.view,
            "shape": list(self.shape),
            **{name: getattr(self, name).tolist() for name in _VECTORS},
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ConeGeometry:
        """The inverse of `as_dict`.

        Raises:
            InputError: a key is missing or its value is not what it must be.
        """
        try:
            if values["format"] != _FORMAT:
                raise InputError(f"geometry of format {values['format']!r}, {_FORMAT!r} is needed")
            vectors = {name: np.asarray(values[name], dtype=np.float64) for name in _VECTORS}
            rows, columns = (int(length) for length in values["shape"])
            view = values["view"]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"geometry is damaged ({type(error).__name__}: {error}): render the picture again"
            ) from error
        sound = view in VIEWS and min(rows, columns) > 0
        sound = sound and all(vector.shape == (3,) and np.isfinite(vector).all() for vector in vectors.values())
        area = float(np.linalg.norm(np.cross(vectors["row_step_mm"], vectors["column_step_mm"]))) if sound else 0.0
        geometry = cls(view=view, shape=(rows, columns), **vectors)
        if not area > 0 or not geometry.source_detector_mm > 0:
            raise InputError("geometry is damaged (no detector in front of the source): render the picture again")
        return geometry


_VECTORS = ("source_mm", "first_pixel_mm", "row_step_mm", "column_step_mm")


def beam_direction(view: View) -> np.ndarray:
    """(3,) RAS+ unit vector of the central ray: anterior for frontal (PA), to the patient's left for lateral."""
    _require_view(view)
    return np.array(_BEAM[view])


def cone_geometry(
    view: View,
    isocentre_mm: Sequence[float],
    shape: tuple[int, int],
    pixel_spacing_mm: float,
    *,
    source_detector_mm: float = SOURCE_DETECTOR_MM,
    source_isocentre_mm: float = SOURCE_ISOCENTRE_MM,
) -> ConeGeometry:
    """A chest stand: the central ray passes the isocentre and meets the middle of the detector at a right angle.

    Args:
        view: "frontal" (postero-anterior) or "lateral" (left side at the detector).
        isocentre_mm: (3,) RAS+ mm, usually the middle of the chest.
        shape: (rows, columns) of the detector.
        pixel_spacing_mm: of its square pixels.
        source_detector_mm: source to detector.
        source_isocentre_mm: source to isocentre, less than ``source_detector_mm``.

    Raises:
        ConfigurationError: unknown view, or distances and sizes that make no picture.
    """
    _require_view(view)
    if not (0 < source_isocentre_mm < source_detector_mm and pixel_spacing_mm > 0 and min(shape) > 0):
        raise ConfigurationError(
            f"cone beam with source to isocentre {source_isocentre_mm} mm, source to detector {source_detector_mm} mm, "
            f"{shape[0]}×{shape[1]} pixels of {pixel_spacing_mm} mm: the isocentre must lie between source and detector"
        )
    beam, right, down = (np.array(vector) for vector in (_BEAM[view], _RIGHT[view], _DOWN))
    source = np.asarray(isocentre_mm, dtype=np.float64) - source_isocentre_mm * beam
    row_step, column_step = down * pixel_spacing_mm, right * pixel_spacing_mm
    middle = source + source_detector_mm * beam
    first = middle - row_step * (shape[0] - 1) / 2 - column_step * (shape[1] - 1) / 2
    return ConeGeometry(view, source, first, row_step, column_step, shape)


def ray_of_pixel(geometry: ConeGeometry, row: float, column: float) -> Ray:
    """The ray that ends in a pixel; fractions are allowed."""
    path = geometry.pixel_mm(row, column) - geometry.source_mm
    length = float(np.linalg.norm(path))
    return Ray(geometry.source_mm.copy(), path / length, length)


def rays(geometry: ConeGeometry) -> tuple[np.ndarray, np.ndarray]:
    """All rays of a picture: their common origin (3,) in RAS+ mm and unit directions (rows, columns, 3)."""
    rows, columns = np.meshgrid(*(np.arange(length) for length in geometry.shape), indexing="ij")
    paths = geometry.pixel_mm(rows, columns) - geometry.source_mm
    return geometry.source_mm.copy(), paths / np.linalg.norm(paths, axis=-1, keepdims=True)


def world_to_voxel(points_mm: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """World points (..., 3) -> fractional indices (..., 3) as (d, h, w) of the volume with this affine (4, 4)."""
    inverse = np.linalg.inv(checked_affine(affine))
    return np.asarray(points_mm, dtype=np.float64) @ inverse[:3, :3].T + inverse[:3, 3]


def voxel_to_world(indices: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Indices (..., 3) as (d, h, w) -> world points (..., 3) in RAS+ mm."""
    affine = checked_affine(affine)
    return np.asarray(indices, dtype=np.float64) @ affine[:3, :3].T + affine[:3, 3]


def voxels_on_ray(
    ray: Ray, affine: np.ndarray, shape_dhw: Sequence[int], step_mm: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Follow a ray through a volume.

    Args:
        ray: in RAS+ mm.
        affine: (4, 4) of the volume.
        shape_dhw: its size.
        step_mm: distance between samples; the first lies half a step behind the point of entry.

    Returns:
        Fractional indices (n, 3) as (d, h, w) inside the volume, whose outer faces are at -1/2 and size - 1/2, and
        their distances (n,) from the source in mm; n = 0 where the ray misses it.
    """
    start, end = world_to_voxel(np.stack([ray.origin_mm, ray.at(ray.length_mm)]), affine)
    low, high = np.full(3, -0.5), np.asarray(shape_dhw, dtype=np.float64) - 0.5
    with np.errstate(divide="ignore", invalid="ignore"):
        crossings = np.stack([(low - start) / (end - start), (high - start) / (end - start)])
    # a ray parallel to a pair of faces lies between them everywhere or nowhere; 0/0 lies on a face
    crossings = np.where(np.isnan(crossings), [[-np.inf], [np.inf]], crossings)
    entry = max(0.0, float(crossings.min(axis=0).max()))
    leave = min(1.0, float(crossings.max(axis=0).min()))
    distances = np.arange(entry * ray.length_mm + step_mm / 2, leave * ray.length_mm, step_mm)
    return world_to_voxel(ray.at(distances), affine), distances


def _require_view(view: str) -> None:
    if view not in VIEWS:
        raise ConfigurationError(f"view {view!r} is unknown: one of {', '.join(VIEWS)}")
