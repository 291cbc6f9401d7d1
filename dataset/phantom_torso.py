"""The walls of the phantom: skin, muscle, chest cavity, diaphragm and lungs as functions of position in mm.

Coordinates are LPS millimetres around the middle of the thorax (see ``dataset.phantom_shapes``); numbers in the tables
are those of the reference thorax, which the patient's scales stretch.
"""

from __future__ import annotations

import numpy as np
from scipy.interpolate import PchipInterpolator

from dataset.phantom_patient import Patient
from dataset.phantom_shapes import Ellipsoid, Grid, smooth_minimum, smoothstep

# Half-axes of cross-sections, mm: height z, half-width, front, back. Thorax from T12 (-150) to the apex (125).
CAVITY_TABLE = np.array(
    [
        [-320, 128, 88, 62],
        [-230, 126, 92, 66],
        [-160, 133, 96, 74],
        [-90, 138, 94, 84],
        [-30, 135, 86, 87],
        [20, 128, 76, 85],
        [60, 113, 63, 78],
        [95, 90, 48, 67],
        [120, 68, 35, 54],
        [145, 46, 25, 42],
        [175, 34, 22, 32],
        [320, 32, 22, 30],
    ],
    dtype=np.float64,
)
MUSCLE_TABLE = np.array(
    [
        [-320, 140, 98, 100],
        [-230, 140, 102, 102],
        [-160, 147, 106, 106],
        [-90, 154, 107, 113],
        [-30, 157, 105, 116],
        [20, 159, 101, 115],
        [60, 162, 92, 110],
        [95, 163, 77, 101],
        [125, 150, 62, 88],
        [150, 112, 52, 74],
        [175, 76, 50, 66],
        [205, 62, 52, 60],
        [320, 60, 54, 58],
    ],
    dtype=np.float64,
)
# 0: a rounded rectangle (|x|^4 + |y|^4), 1: an ellipse.
ROUNDNESS = {"cavity": 0.62, "muscle": 0.5, "body": 0.55}

APEX_MM = 125.0
DOME_MM = -73.0  # right dome of the diaphragm at medium inspiration
DOME_TRAVEL_MM = 34.0


class Torso:
    """Body walls of one patient.

    Args:
        patient: scales, fat, muscle, inspiration.
    """

    def __init__(self, patient: Patient) -> None:
        self.patient = patient
        self.scale = np.array([patient.scale_lateral, patient.scale_ap, patient.scale_long])
        sx, sy, sz = self.scale
        self.apex_mm = APEX_MM * sz
        self.dome_shift_mm = -DOME_TRAVEL_MM * (patient.inspiration - 0.5)
        self.dome_right_mm = DOME_MM * sz + self.dome_shift_mm
        self.dome_left_mm = self.dome_right_mm - 9.0 * sz
        self._axes: dict[str, PchipInterpolator] = {}
        stretch = np.array([sz, sx, sy, sy])
        cavity, muscle = CAVITY_TABLE * stretch, MUSCLE_TABLE * stretch
        muscle[:, 1:] += patient.muscle_mm
        # a neck carries little fat, a belly more
        share = np.interp(muscle[:, 0], [-200 * sz, -60 * sz, 110 * sz, 190 * sz], [1.15, 1.0, 0.8, 0.35])
        body = muscle.copy()
        body[:, 1:] += (patient.fat_mm * share)[:, None] * np.array([1.0, 0.85, 0.85])
        for name, table in (("cavity", cavity), ("muscle", muscle), ("body", body)):
            self._axes[name] = PchipInterpolator(table[:, 0], table[:, 1:])
            self._range = (table[0, 0], table[-1, 0])
        self.half_width_mm = float(body[:, 1].max())
        self.breasts = self._place_breasts()

    def axes(self, layer: str, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Half-width, front and back half-axis (mm, float32, shaped like ``z``) of "cavity", "muscle" or "body"."""
        values = self._axes[layer](np.clip(z, *self._range)).astype(np.float32)
        return values[..., 0], values[..., 1], values[..., 2]

    def _shape(self, layer: str, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where a point lies on the way from the axis (0) to the wall (1), and the wall's mean radius in mm."""
        width, front, back = self.axes(layer, z)
        u = np.square(x / width)
        v = np.square(y / np.where(y < 0, front, back))
        twice = np.float32(2.0 * ROUNDNESS[layer])
        quartic = u * v
        quartic *= twice
        quartic += np.square(u)
        quartic += np.square(v)
        np.sqrt(quartic, out=quartic)
        np.sqrt(quartic, out=quartic)
        return quartic, 0.5 * width + 0.25 * (front + back)

    def distance(self, layer: str, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Approximate distance (mm) from the wall of a layer, negative inside; float32, coordinates broadcast."""
        rho, radius = self._shape(layer, x, y, z)
        rho -= np.float32(1.0)
        rho *= radius
        if layer != "cavity":
            # the furrow over the spine, and a shallow one over the sternum
            depth = np.where(y > 0, 4.5, 3.0) * smoothstep(np.abs(y), 20.0, 60.0)
            rho += (depth * np.exp(-np.square(x / np.where(y > 0, 15.0, 24.0)))).astype(np.float32)
        return rho

    def surface(self, layer: str, angle_deg: np.ndarray, z: np.ndarray, offset_mm: float = 0.0) -> np.ndarray:
        """Points (N, 3) on a layer's wall; the angle runs from the back (0) over the left (90) to the front (180)."""
        angle = np.deg2rad(np.asarray(angle_deg, dtype=np.float64))
        z = np.broadcast_to(np.asarray(z, dtype=np.float64), angle.shape)
        dx, dy = np.sin(angle), np.cos(angle)
        rho, _ = self._shape(layer, dx.copy(), dy.copy(), z)
        r = 1.0 / rho + offset_mm
        return np.stack([r * dx, r * dy, z], axis=-1)

    def spine_y(self, z: np.ndarray) -> np.ndarray:
        """Position y (mm) of the centres of the vertebral bodies."""
        return np.asarray(self.axes("cavity", z)[2] - 24.0 * self.scale[1], dtype=np.float32)

    def _place_breasts(self) -> list[Ellipsoid]:
        r, sz = self.patient.breast_mm, float(self.scale[2])
        if r <= 0.0:
            return []
        breasts = []
        for side in (-1.0, 1.0):
            # supine, a breast spreads sideways
            at = self.surface("body", np.array([180.0 - side * 42.0]), np.array([-2.0 * sz]))[0]
            outward = np.array([side * 0.62, -0.78, 0.0])
            breasts.append(Ellipsoid.along(at - outward * 0.3 * r, (0.5 * r, 0.95 * r, r), outward))
        return breasts

    def body_distance(self, grid: Grid) -> np.ndarray:
        """Distance (mm) from the skin with breasts, (D, H, W)."""
        x, y, z = grid.coordinates()
        field = self.distance("body", x, y, z)
        for breast in self.breasts:
            box = grid.box(*breast.bounds(45.0))
            if box is not None:
                field[box] = smooth_minimum(field[box], breast.distance(*grid.coordinates(box)), 32.0)
        return field

    def diaphragm(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Height (mm) of the diaphragm's upper side at (x, y), and the cosine of its slope; coordinates broadcast."""
        step = 1.0
        height = self._diaphragm_height(x, y)
        gx = (self._diaphragm_height(x + step, y) - self._diaphragm_height(x - step, y)) / (2 * step)
        gy = (self._diaphragm_height(x, y + step) - self._diaphragm_height(x, y - step)) / (2 * step)
        return height.astype(np.float32), (1.0 / np.sqrt(1.0 + gx**2 + gy**2)).astype(np.float32)

    def _diaphragm_height(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        sx, sy, sz = self.scale
        domes = []
        for side, top in ((-1.0, self.dome_right_mm), (1.0, self.dome_left_mm)):
            outward = side * x / sx - 66.0
            # it falls steeply to the ribs, hardly at all towards the central tendon
            across = np.square(outward / np.where(outward > 0, 70.0, 150.0))
            along = np.square((y / sy + 6.0) / 84.0)
            drop = 58.0 * (across + along) + np.maximum(y / sy, 0.0) * 0.28
            domes.append(top - np.minimum(drop, 62.0 + 0.35 * np.maximum(drop - 62.0, 0.0)) * sz)
        left = 1.0 / (1.0 + np.exp(-np.clip(x / 9.0, -30.0, 30.0)))
        return np.asarray(domes[0] * (1 - left) + domes[1] * left)

    def cupola(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Height (mm) of the tops of the lungs at (x, y)."""
        sx, sy, sz = self.scale
        dx, dy = (np.abs(x) / sx - 46.0) / 38.0, (y / sy - 16.0) / 46.0
        return np.asarray(self.apex_mm - 30.0 * sz * (np.square(dx) + np.square(dy)), dtype=np.float32)

    def pleura_distance(self, x: np.ndarray, y: np.ndarray, z: np.ndarray, cavity: np.ndarray) -> np.ndarray:
        """Distance (mm) from what lungs and mediastinum fill together: the cavity above the diaphragm."""
        height, cosine = self.diaphragm(x, y)
        out = np.subtract(height, z, dtype=np.float32)
        out *= cosine
        np.maximum(out, cavity + np.float32(0.5), out=out)
        roof = np.subtract(z, self.cupola(x, y), dtype=np.float32)
        roof *= np.float32(0.7)
        return np.maximum(out, roof, out=out)

    def midline_distance(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Distance (mm) from the fat between the lungs without heart and vessels: thin in front, wide at the spine."""
        sx, sy, sz = self.scale
        spine_y = self.spine_y(z)
        half = 3.0 + 12.0 * smoothstep(y / sy, -66.0, -30.0) + 5.0 * smoothstep(y / sy, 10.0, 40.0)
        half = half + 9.0 * smoothstep(z / sz, 30.0, 90.0) * smoothstep(y / sy, -60.0, -40.0)
        # the vertebral column, and everything behind its front
        behind = np.minimum(y - spine_y, 0.0)
        column = np.sqrt(np.square(x) + np.square(behind)) - np.float32(25.0 * sx)
        slab = np.abs(x) - (half * sx).astype(np.float32)
        return np.asarray(np.minimum(column, slab), dtype=np.float32)
