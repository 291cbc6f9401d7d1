"""Implicit shapes in millimetres and their sampling on a grid: signed distances, tubes, ellipsoids.

Points are ``(x, y, z)`` in LPS millimetres: x to the patient's left, y to the back, z to the head. Arrays are
``(D, H, W)``. Distances are negative inside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.interpolate import CubicSpline

Box = tuple[slice, slice, slice]

FAR_MM = np.float32(1e3)


@dataclass(frozen=True)
class Grid:
    """Voxel centres of an axis-aligned block.

    Attributes:
        z: (D,) float32 mm, ascending.
        y: (H,) float32 mm, ascending.
        x: (W,) float32 mm, ascending.
        spacing_mm: (D, H, W) voxel size.
        edge_mm: width of the soft edge that stands for partial volume and the kernel's point spread.
    """

    z: np.ndarray
    y: np.ndarray
    x: np.ndarray
    spacing_mm: tuple[float, float, float]
    edge_mm: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, H, W)."""
        return len(self.z), len(self.y), len(self.x)

    @property
    def voxel_mm(self) -> float:
        """Geometric mean of the voxel's edges, mm."""
        return float(np.prod(self.spacing_mm) ** (1.0 / 3.0))

    def coordinates(self, box: Box | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Axes x (1, 1, w), y (1, h, 1), z (d, 1, 1) of a box, or of the whole grid; float32 mm."""
        sz, sy, sx = box if box is not None else (slice(None),) * 3
        return self.x[None, None, sx], self.y[None, sy, None], self.z[sz, None, None]

    def box(self, low: ArrayLike, high: ArrayLike) -> Box | None:
        """Index box of the voxel centres between two corners (x, y, z) in mm; None where there are none."""
        low, high = np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)
        slices = []
        for axis, centres in ((2, self.z), (1, self.y), (0, self.x)):
            start, stop = np.searchsorted(centres, [low[axis], high[axis]])
            if start >= stop:
                return None
            slices.append(slice(int(start), int(stop)))
        return slices[0], slices[1], slices[2]


def coverage(distance_mm: np.ndarray, edge_mm: float) -> np.ndarray:
    """Share of a voxel that lies inside: 1 well inside, 0 well outside, a ramp of ``edge_mm`` around the surface."""
    share = np.multiply(distance_mm, np.float32(-1.0 / edge_mm))
    share += np.float32(0.5)
    return np.clip(share, 0.0, 1.0, out=share)


def smoothstep(value: np.ndarray, start: float, stop: float) -> np.ndarray:
    """0 before ``start``, 1 after ``stop``, smooth between; ``start`` may lie above ``stop``."""
    t = np.clip((value - start) / (stop - start), 0.0, 1.0)
    return np.asarray(t * t * (3.0 - 2.0 * t))


def smooth_minimum(a: np.ndarray, b: np.ndarray, width_mm: float) -> np.ndarray:
    """Union of two distances whose crease is filled over ``width_mm``."""
    h = np.maximum(width_mm - np.abs(a - b), 0.0) / width_mm
    return np.asarray(np.minimum(a, b) - h * h * (0.25 * width_mm))


def capsule(
    x: np.ndarray, y: np.ndarray, z: np.ndarray, p: np.ndarray, q: np.ndarray, r_p: float, r_q: float
) -> np.ndarray:
    """Distance (mm) from a round-ended cone between ``p`` and ``q``, at coordinates that broadcast."""
    d = q - p
    scaled = (d / max(float(d @ d), 1e-9)).astype(np.float32)
    d, p = d.astype(np.float32), p.astype(np.float32)
    dx, dy, dz = x - p[0], y - p[1], z - p[2]
    t = (dx * scaled[0] + dy * scaled[1]) + dz * scaled[2]
    np.maximum(t, 0.0, out=t)
    np.minimum(t, 1.0, out=t)
    out = np.square(dx - t * d[0])
    out += np.square(dy - t * d[1])
    out += np.square(dz - t * d[2])
    np.sqrt(out, out=out)
    out -= np.float32(r_p)
    if r_p != r_q:
        out -= t * np.float32(r_q - r_p)
    return np.asarray(out)


@dataclass(frozen=True)
class Tube:
    """A bent round bar: capsules along a polyline.

    Attributes:
        name: class of the tube, see ``dataset.phantom.LABELS``.
        points: (N, 3) mm.
        radii: (N,) mm.
        flatten_z: below 1 the cross-section is taller than wide by its inverse (ribs).
    """

    name: str
    points: np.ndarray
    radii: np.ndarray
    flatten_z: float = 1.0

    @classmethod
    def through(
        cls, name: str, knots: ArrayLike, radii: ArrayLike, *, step_mm: float = 8.0, flatten_z: float = 1.0
    ) -> Tube:
        """A smooth tube through knots (K, 3) mm with radii (K,) mm, K >= 2."""
        points = np.asarray(knots, dtype=np.float64)
        radius = np.broadcast_to(np.asarray(radii, dtype=np.float64), len(points))
        along = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
        n = max(2, math.ceil(along[-1] / step_mm) + 1)
        at = np.linspace(0.0, along[-1], n)
        bent = CubicSpline(along, points, bc_type="natural")(at) if len(points) > 2 else None
        straight = np.stack([np.interp(at, along, points[:, axis]) for axis in range(3)], axis=1)
        return cls(name, straight if bent is None else bent, np.interp(at, along, radius), flatten_z)

    def _pieces(self) -> zip[tuple[np.ndarray, np.ndarray, float, float]]:
        return zip(self.points[:-1], self.points[1:], self.radii[:-1], self.radii[1:], strict=True)

    def distance(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Distance in mm at coordinates that broadcast."""
        scale = np.array([1.0, 1.0, self.flatten_z])
        out: np.ndarray | None = None
        for p, q, r_p, r_q in self._pieces():
            part = capsule(x, y, z * np.float32(self.flatten_z), p * scale, q * scale, r_p, r_q)
            out = part if out is None else np.minimum(out, part, out=out)
        assert out is not None
        return out

    def bounds(self, margin_mm: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """Corners (x, y, z) of the bounding box, mm."""
        reach = (self.radii + margin_mm)[:, None] * np.array([1.0, 1.0, 1.0 / self.flatten_z])
        return (self.points - reach).min(axis=0), (self.points + reach).max(axis=0)

    def rasterise(self, grid: Grid, margin_mm: float) -> tuple[Box, np.ndarray] | None:
        """The box that holds the tube and its distance there, exact up to ``margin_mm`` outside, else ``FAR_MM``."""
        reach = (self.radii + margin_mm)[:, None] * np.array([1.0, 1.0, 1.0 / self.flatten_z])
        low, high = self.points - reach, self.points + reach
        whole = grid.box(low.min(axis=0), high.max(axis=0))
        if whole is None:
            return None
        origin = np.array([whole[0].start, whole[1].start, whole[2].start])
        field = np.full([s.stop - s.start for s in whole], FAR_MM, dtype=np.float32)
        scale = np.array([1.0, 1.0, self.flatten_z])
        for i, (p, q, r_p, r_q) in enumerate(self._pieces()):
            box = grid.box(np.minimum(low[i], low[i + 1]), np.maximum(high[i], high[i + 1]))
            if box is None:
                continue
            x, y, z = grid.coordinates(box)
            part = capsule(x, y, z * np.float32(self.flatten_z), p * scale, q * scale, r_p, r_q)
            local = tuple(slice(s.start - o, s.stop - o) for s, o in zip(box, origin, strict=True))
            np.minimum(field[local], part, out=field[local])
        return whole, field


@dataclass(frozen=True)
class Ellipsoid:
    """An ellipsoid.

    Attributes:
        centre: (3,) mm.
        half_axes: (3,) mm.
        rotation: (3, 3), rows are the directions of the axes.
    """

    centre: np.ndarray
    half_axes: np.ndarray
    rotation: np.ndarray

    @classmethod
    def along(cls, centre: ArrayLike, half_axes: ArrayLike, direction: ArrayLike = (1.0, 0.0, 0.0)) -> Ellipsoid:
        """The first half axis points along ``direction``; the third stays as near to the z axis as it can."""
        first = np.asarray(direction, dtype=np.float64)
        first = first / np.linalg.norm(first)
        up = np.array([0.0, 0.0, 1.0]) if abs(first[2]) < 0.95 else np.array([0.0, 1.0, 0.0])
        second = np.cross(up, first)
        second /= np.linalg.norm(second)
        rotation = np.stack([first, second, np.cross(first, second)])
        return cls(np.asarray(centre, dtype=np.float64), np.asarray(half_axes, dtype=np.float64), rotation)

    def bounds(self, margin_mm: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """Corners (x, y, z) of the bounding box, mm."""
        reach = np.sqrt(np.square(self.rotation * self.half_axes[:, None]).sum(axis=0)) + margin_mm
        return self.centre - reach, self.centre + reach

    def distance(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """First-order distance in mm at coordinates that broadcast; exact on the surface."""
        c, k = self.centre.astype(np.float32), (self.rotation / self.half_axes[:, None]).astype(np.float32)
        dx, dy, dz = x - c[0], y - c[1], z - c[2]
        value: np.ndarray | float = 0.0
        slope: np.ndarray | float = 0.0
        for axis in range(3):
            u = (dx * k[axis, 0] + dy * k[axis, 1]) + dz * k[axis, 2]
            value = value + np.square(u)
            slope = slope + np.square(u * np.float32(1.0 / self.half_axes[axis]))
        root = np.sqrt(value)
        return np.asarray(root * (root - 1.0) / np.maximum(np.sqrt(slope), np.float32(1e-6)))
