"""Smooth random fields for the grain of tissues."""

from __future__ import annotations

import math

import numpy as np

from dataset.phantom_shapes import Grid

# Standard deviation of cubic B-spline interpolation of white unit noise, per axis.
SPLINE_STD = math.sqrt(151.0 / 315.0)


class Texture:
    """A smooth random field of zero mean and unit standard deviation that is fixed in the patient, not in the grid.

    Args:
        rng: source of the field.
        pitch_mm: distance of its nodes; blobs are about twice as large.
        n: nodes per axis; the field repeats after ``n * pitch_mm``.
    """

    def __init__(self, rng: np.random.Generator, pitch_mm: float, n: int = 32) -> None:
        self.pitch_mm = pitch_mm
        self.nodes = rng.standard_normal((n, n, n), dtype=np.float32) / np.float32(SPLINE_STD**3)

    def _weights(self, at_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Nodes and weights (4, len(at_mm)) of a periodic cubic B-spline."""
        u = np.asarray(at_mm, dtype=np.float64) / self.pitch_mm
        base = np.floor(u).astype(np.int64)
        t = u - base
        weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]) / 6.0
        return (base + np.arange(-1, 3)[:, None]) % len(self.nodes), weights.astype(np.float32)

    def plane(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """(n, H, W): the field interpolated in plane, to be handed to ``sample``; coordinates in mm."""
        node, weight = self._weights(x)
        wide = sum(self.nodes[:, :, node[k]] * weight[k] for k in range(4))
        node, weight = self._weights(y)
        return np.asarray(sum(np.asarray(wide)[:, node[k]] * weight[k][:, None] for k in range(4)))

    def sample(self, plane: np.ndarray, grid: Grid) -> np.ndarray:
        """(D, H, W) float32 on the grid; fades where the voxels are too large to show it."""
        node, weight = self._weights(grid.z)
        weight *= np.float32(min(1.0, 1.5 * self.pitch_mm / grid.voxel_mm))
        field = np.empty(grid.shape, dtype=np.float32)
        scratch = np.empty(grid.shape[1:], dtype=np.float32)
        for i, out in enumerate(field):
            np.multiply(plane[node[0, i]], weight[0, i], out=out)
            for k in range(1, 4):
                out += np.multiply(plane[node[k, i]], weight[k, i], out=scratch)
        return field
