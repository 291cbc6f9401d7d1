"""The skeleton of the phantom: ribs with their cartilages, vertebrae, sternum, clavicles, scapulae."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dataset.phantom_shapes import Box, Ellipsoid, Grid, Tube, smoothstep
from dataset.phantom_torso import Torso

VERTEBRA_MM = 23.5  # height of a vertebra with its disc
DISC_MM = 5.0
T1_MM = 126.0
N_RIBS = 12

# Per rib: angle of its front end (0 back, 180 front), how far it descends, where its cartilage meets the sternum.
RIB_END_DEG = (147, 150, 151, 151, 150, 148, 144, 137, 128, 118, 88, 62)
RIB_DROP_MM = (24, 42, 56, 66, 74, 81, 86, 87, 84, 76, 48, 28)
STERNUM_JOINT_MM = (80, 46, 21, -4, -27, -45, -58)
RIB_RADIUS_MM = (4.6, 4.7, 4.9, 5.1, 5.2, 5.2, 5.2, 5.1, 5.0, 4.8, 4.4, 4.0)


@dataclass(frozen=True)
class Bones:
    """Implicit bones.

    Attributes:
        tubes: ribs, clavicles, vertebral processes, crests of the scapulae.
        cartilages: costal cartilages.
        plates: (class name, ellipsoid): blades of the scapulae.
    """

    tubes: list[Tube]
    cartilages: list[Tube]
    plates: list[tuple[str, Ellipsoid]]


def build_bones(torso: Torso) -> Bones:
    """The bones of a patient; everything lies outside the pleura."""
    tubes, cartilages = [], []
    for side in (-1.0, 1.0):
        mirror = np.array([side, 1.0, 1.0])
        previous = np.zeros((0, 3))
        for i in range(N_RIBS):
            rib, cartilage = _rib(torso, i, previous)
            radius = RIB_RADIUS_MM[i] * float(torso.scale.mean())
            tubes.append(Tube.through("rib", rib * mirror, radius, step_mm=14.0, flatten_z=0.68))
            if len(cartilage):
                cartilages.append(Tube.through("cartilage", cartilage * mirror, 0.95 * radius, flatten_z=0.75))
                previous = cartilage
        tubes.append(_clavicle(torso, side))
    tubes += _vertebral_processes(torso)
    plates = []
    for side in (-1.0, 1.0):
        blade, crest = _scapula(torso, side)
        plates.append(("scapula", blade))
        tubes.append(crest)
    return Bones(tubes, cartilages, plates)


def _rib(torso: Torso, i: int, previous: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Knots (N, 3) of a left rib from its neck forward, and of its cartilage (none for floating ribs)."""
    sx, sy, sz = torso.scale
    clear = RIB_RADIUS_MM[i] * float(torso.scale.mean()) + 1.5
    z0 = (T1_MM - VERTEBRA_MM * i) * sz
    angle = np.linspace(19.0, RIB_END_DEG[i], 13)
    t = (angle - angle[0]) / (150.0 - angle[0])
    z = z0 - RIB_DROP_MM[i] * sz * (0.55 * t + 0.45 * smoothstep(t, 0.0, 1.0))
    arc = torso.surface("cavity", angle, z, clear)
    neck = np.array([[15.0 * sx, float(torso.spine_y(np.array(z0))) + 9.0 * sy, z0 + 1.0]])
    rib = np.concatenate([neck, arc])
    if i >= 10:
        return rib, np.zeros((0, 3))
    if i < len(STERNUM_JOINT_MM):
        z_joint = STERNUM_JOINT_MM[i] * sz
        joint = np.array([15.0 * sx, -float(torso.axes("cavity", np.array(z_joint))[1]) - clear, z_joint])
        middle = 0.5 * (RIB_END_DEG[i] + 170.0)
        z_middle = 0.55 * z[-1] + 0.45 * z_joint - 4.0
        between = torso.surface("cavity", np.array([middle]), np.array([z_middle]), clear)
        return rib, np.concatenate([arc[-1:], between, joint[None]])
    # false ribs lean on the cartilage above them
    return rib, np.stack([arc[-1], previous[len(previous) // 2]])


def _clavicle(torso: Torso, side: float) -> Tube:
    sx, sy, sz = torso.scale
    front = -float(torso.axes("cavity", np.array(88.0 * sz))[1])
    knots = [[22 * sx, front - 4, 90 * sz], [62 * sx, front - 10, 101 * sz], [100 * sx, -22 * sy, 114 * sz]]
    knots.append([134 * sx, 6 * sy, 121 * sz])
    return Tube.through("clavicle", np.array(knots) * [side, 1.0, 1.0], 5.2, step_mm=12.0)


def _scapula(torso: Torso, side: float) -> tuple[Ellipsoid, Tube]:
    """The blade behind ribs 2 to 7, and its crest that runs up to the shoulder."""
    sx, sy, sz = torso.scale
    z = 62.0 * sz
    at = torso.surface("cavity", np.array([side * 47.0]), np.array([z]), 18.0)[0]
    # a blade lies along the wall, its lower tip further out
    normal = np.array([side * 0.55, 0.83, 0.10])
    blade = Ellipsoid.along(at, (3.2, 40.0 * sx, 60.0 * sz), normal)
    inner = at + np.array([-side * 24.0 * sx, 18.0, 30.0 * sz])
    outer = at + np.array([side * 45.0 * sx, -26.0 * sy, 50.0 * sz])
    return blade, Tube.through("scapula", np.stack([inner, 0.5 * (inner + outer) + [0, 8, 0], outer]), [3.0, 4.5, 7.0])


def _vertebral_processes(torso: Torso) -> list[Tube]:
    sx, sy, sz = torso.scale
    tubes = []
    for k in range(-6, 20):
        z = (T1_MM - VERTEBRA_MM * k) * sz
        y = float(torso.spine_y(np.array(z)))
        thoracic = 0 <= k < 12
        slope = 17.0 if thoracic else 5.0
        tip = [0.0, y + (47.0 if thoracic else 46.0) * sy, z - slope * sz]
        tubes.append(
            Tube.through("spine", [[0.0, y + 38.0 * sy, z - 3.0], tip], [4.5, 3.2], step_mm=40.0, flatten_z=0.6)
        )
        for side in (-1.0, 1.0):
            root, end = [side * 12.0 * sx, y + 25.0 * sy, z + 2.0], [side * 33.0 * sx, y + 33.0 * sy, z + 4.0]
            tubes.append(Tube.through("spine", [root, end], [5.5, 4.5], step_mm=40.0))
            pedicle = [side * 9.0 * sx, y + 10.0 * sy, z + 2.0]
            tubes.append(Tube.through("spine", [pedicle, root], [4.5, 5.0], step_mm=40.0))
    return tubes


def vertebral_column(torso: Torso, grid: Grid) -> tuple[Box, np.ndarray, np.ndarray, np.ndarray] | None:
    """Distances (mm) from vertebrae, discs and the spinal canal in the box that holds the column."""
    sx, sy, sz = torso.scale
    z_grid = grid.z.astype(np.float64)
    centre = torso.spine_y(z_grid)
    box = grid.box(
        [-45.0 * sx, float(centre.min()) - 35.0, float(grid.z[0]) - 1.0],
        [45.0 * sx, float(centre.max()) + 60.0, float(grid.z[-1]) + 1.0],
    )
    if box is None:
        return None
    x, y, z = grid.coordinates(box)
    y = y - centre[box[0]][:, None, None]
    pitch = VERTEBRA_MM * sz
    from_middle = np.abs(np.mod(z - T1_MM * sz + 0.5 * pitch, pitch) - 0.5 * pitch).astype(np.float32)
    body_half = 0.5 * (pitch - DISC_MM)
    # a vertebral body has a waist; lower ones are larger
    grow = (1.0 - 0.0011 * z).astype(np.float32)
    waist = (1.0 - 0.10 * np.clip(1.0 - from_middle / body_half, 0.0, 1.0)).astype(np.float32) * grow
    radial = np.sqrt(np.square(x / (17.5 * sx * waist)) + np.square(y / (14.5 * sy * waist)))
    radial -= np.float32(1.0)
    radial *= np.float32(16.0)
    vertebra = np.maximum(radial, from_middle - np.float32(body_half))
    disc = np.maximum(radial + np.float32(0.8), np.float32(body_half) - from_middle)
    canal_r = np.sqrt(np.square(x / np.float32(1.15)) + np.square(y - np.float32(25.0 * sy)))
    canal = canal_r - np.float32(8.0)
    arch = np.maximum(np.abs(canal_r - np.float32(11.3)) - np.float32(3.0), from_middle - np.float32(0.36 * pitch))
    np.minimum(vertebra, np.maximum(arch, -canal), out=vertebra)
    return box, vertebra, disc, canal


def sternum(torso: Torso, grid: Grid) -> tuple[Box, np.ndarray] | None:
    """Distance (mm) from manubrium and body of the sternum in their box."""
    sx, _, sz = torso.scale
    front = float(torso.axes("cavity", np.linspace(-90.0, 100.0, 20) * sz)[1].max())
    box = grid.box([-45.0 * sx, -front - 30.0, -92.0 * sz], [45.0 * sx, 0.0, 104.0 * sz])
    if box is None:
        return None
    x, y, z = grid.coordinates(box)
    middle = -torso.axes("cavity", z.astype(np.float64))[1] - np.float32(8.0)
    level = z / sz
    half = 14.5 + 13.0 * smoothstep(level, 44.0, 84.0) - 8.0 * smoothstep(level, -45.0, -80.0)
    half = half - 3.0 * np.exp(-np.square((level - 46.0) / 7.0))
    # a rounded plate; curved with the chest wall
    across = np.maximum(np.abs(x) - (half * sx - 4.5).astype(np.float32), 0.0)
    depth = np.maximum(np.abs(y - middle - np.square(x) * np.float32(0.004)) - np.float32(1.5), 0.0)
    along = np.maximum(np.maximum(level - 86.0, -78.0 - level) * sz, 0.0).astype(np.float32)
    return box, np.asarray(np.sqrt(np.square(across) + np.square(depth) + np.square(along)) - np.float32(4.5))
