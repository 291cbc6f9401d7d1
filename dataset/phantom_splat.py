"""Thin tubes by the thousand, such as the vessels of the lungs: volume-carrying points instead of distances."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dataset.phantom_shapes import Grid

GOLDEN_ANGLE = math.pi * (3.0 - math.sqrt(5.0))


@dataclass(frozen=True)
class Segments:
    """Many straight thin tubes: the branches of a tree.

    Attributes:
        start: (N, 3) mm.
        end: (N, 3) mm.
        radius_start: (N,) mm.
        radius_end: (N,) mm.
        generation: (N,) int; the trunk is 0.
    """

    start: np.ndarray
    end: np.ndarray
    radius_start: np.ndarray
    radius_end: np.ndarray
    generation: np.ndarray

    @classmethod
    def join(cls, parts: list[Segments]) -> Segments:
        """All segments of several trees."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__annotations__))

    def select(self, which: np.ndarray) -> Segments:
        """The segments of a boolean or index array."""
        return Segments(*(getattr(self, name)[which] for name in self.__annotations__))

    def thickened(self, factor: float, extra_mm: float) -> Segments:
        """The same branches with other radii."""
        r0, r1 = self.radius_start * factor + extra_mm, self.radius_end * factor + extra_mm
        return Segments(self.start, self.end, r0, r1, self.generation)


def splat(segments: Segments, grid: Grid) -> np.ndarray:
    """Volume fraction of thin tubes in every voxel, (D, H, W) float32 in [0, 1].

    The tubes are filled with points that carry volume, shared out trilinearly: below the size of a voxel
    that is the partial volume effect, and it holds for any anisotropy.
    """
    fraction = np.zeros(grid.shape, dtype=np.float32)
    origin = np.array([grid.x[0], grid.y[0], grid.z[0]], dtype=np.float64)
    size = np.array(grid.spacing_mm[::-1])
    r = np.maximum(segments.radius_start, segments.radius_end)[:, None] + size
    low, high = np.minimum(segments.start, segments.end) - r, np.maximum(segments.start, segments.end) + r
    last = origin + size * (np.array(grid.shape[::-1]) - 1)
    segments = segments.select(((high >= origin) & (low <= last)).all(axis=1))
    if not len(segments.start):
        return fraction

    # the step is tied to the smallest edge, but a needle-shaped voxel does not need a million points
    step = max(0.7 * float(size.min()), 0.25 * grid.voxel_mm)
    length = np.linalg.norm(segments.end - segments.start, axis=1)
    n_along = np.maximum(1, np.ceil(length / step)).astype(np.int64)
    owner = np.repeat(np.arange(len(length)), n_along)
    t = (np.arange(len(owner)) - np.repeat(np.cumsum(n_along) - n_along, n_along) + 0.5) / n_along[owner]
    radius = segments.radius_start[owner] * (1 - t) + segments.radius_end[owner] * t
    axis_points = segments.start[owner] * (1 - t[:, None]) + segments.end[owner] * t[:, None]
    here = (axis_points > origin - radius[:, None] - size) & (axis_points < last + radius[:, None] + size)
    kept = np.flatnonzero(here.all(axis=1))
    owner, radius, axis_points = owner[kept], radius[kept], axis_points[kept]
    volume = np.pi * radius**2 * (length / n_along)[owner] / float(np.prod(size))

    direction = (segments.end - segments.start) / np.maximum(length, 1e-6)[:, None]
    aside = np.where(np.abs(direction[:, 2:]) < 0.9, [[0.0, 0.0, 1.0]], [[1.0, 0.0, 0.0]])
    u = np.cross(direction, aside)
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    v = np.cross(direction, u)

    n_disk = np.clip(np.ceil(np.pi * radius**2 / step**2), 1, 4000).astype(np.int64)
    sample = np.repeat(np.arange(len(owner)), n_disk)
    k = np.arange(len(sample)) - np.repeat(np.cumsum(n_disk) - n_disk, n_disk)
    # a sunflower fills the disk evenly; turning it from sample to sample breaks up rays along the vessel
    rho = np.where(n_disk[sample] > 1, radius[sample] * np.sqrt((k + 0.5) / n_disk[sample]), 0.0)
    angle = GOLDEN_ANGLE * (k + 0.37 * sample)
    seg = owner[sample]
    points = axis_points[sample] + (rho * np.cos(angle))[:, None] * u[seg] + (rho * np.sin(angle))[:, None] * v[seg]
    weight = (volume / n_disk)[sample]

    # one voxel of border on every side takes what falls off the grid
    D, H, W = (n + 2 for n in grid.shape)
    index = (points - origin) / size + 1.0
    kept = ((index >= 0) & (index < [W - 1, H - 1, D - 1])).all(axis=1)
    index, weight = index[kept], weight[kept]
    floor = index.astype(np.int64)
    part = index - floor
    if not len(weight):
        return fraction
    corner = (floor[:, 2] * H + floor[:, 1]) * W + floor[:, 0]
    at, share = [], []
    for dz, along_z in ((0, 1.0 - part[:, 2]), (H * W, part[:, 2])):
        for dy, along_y in ((0, 1.0 - part[:, 1]), (W, part[:, 1])):
            row = weight * along_z * along_y
            far = row * part[:, 0]
            at += [corner + (dz + dy), corner + (dz + dy + 1)]
            share += [row - far, far]
    sums: np.ndarray = np.bincount(np.concatenate(at), weights=np.concatenate(share), minlength=D * H * W).reshape(
        D, H, W
    )
    inner = sums[1:-1, 1:-1, 1:-1]
    # the points are a finite sample: lift what is nearly full, or thick vessels would look mottled
    inner = inner * (1.0 + 0.35 * np.minimum(inner, 1.0))
    return np.clip(inner, 0.0, 1.0, out=fraction, casting="same_kind")
