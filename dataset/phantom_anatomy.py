"""Heart, great vessels, airways and upper abdominal organs of one patient, and where its lungs end.

Everything is built once per patient in LPS millimetres, before any grid is known: resolution cannot change anatomy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from dataset.phantom_bones import build_bones
from dataset.phantom_patient import Patient
from dataset.phantom_shapes import Ellipsoid, Tube, smooth_minimum, smoothstep
from dataset.phantom_splat import Segments
from dataset.phantom_texture import Texture
from dataset.phantom_torso import Torso
from dataset.phantom_vessels import LungTrees, choose_emboli, grow_lung_trees

HEART_CENTRE = np.array([16.0, -18.0, -42.0])
# Fat around vessels that keeps the lung away from them, mm.
PERICARDIUM_MM = 5.0
SHEATH_MM = 3.0


class Anatomy:
    """All implicit shapes of one patient.

    Attributes:
        torso: body walls.
        chambers: name -> list of ellipsoids whose union is the chamber ("left_ventricle_wall" is the outer one).
        outflow: right ventricular outflow tract.
        tubes: great vessels, oesophagus and central airways, in the order in which they are painted.
        bones: skeleton.
        organs: liver is a half-space construction, see ``liver_distance``; the others are ellipsoids.
        trees: vessels and airways of the lungs.
        emboli: branches to fill with clot; empty without embolism.
        textures: "coarse", "medium" and "fine" random fields.
    """

    def __init__(self, patient: Patient) -> None:
        self.patient = patient
        self.torso = Torso(patient)
        self._build_heart()
        self._build_tubes()
        self._build_abdomen()
        self.bones = build_bones(self.torso)
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([patient.seed, 1])))
        self.textures = {
            "coarse": Texture(rng, 16.0, 24),
            "medium": Texture(rng, 6.5, 32),
            "fine": Texture(rng, 3.0, 32),
        }
        self.fissures = self._build_fissures(rng)
        self.trees: LungTrees = grow_lung_trees(self, rng)
        self.emboli: Segments = choose_emboli(self, rng)

    def place(self, points: ArrayLike) -> np.ndarray:
        """Reference millimetres (N, 3) or (3,) -> the patient's; what lies on the diaphragm moves with it."""
        at = np.asarray(points, dtype=np.float64)
        out = at * self.torso.scale
        follow = 0.65 * self.torso.dome_shift_mm * smoothstep(at[..., 2], 22.0, -45.0)
        out[..., 2] += follow * smoothstep(at[..., 2], -240.0, -130.0)
        return out

    def _place_heart(self, points: ArrayLike) -> np.ndarray:
        """Like ``place``, with the size and the axis of this heart."""
        at = np.asarray(points, dtype=np.float64) - HEART_CENTRE
        turn = np.deg2rad(self.patient.heart_axis_deg)
        c, s = np.cos(turn), np.sin(turn)
        at = at @ np.array([[c, 0.0, s], [0.0, 1.0, 0.0], [-s, 0.0, c]]).T
        return self.place(at * self.patient.heart_scale + HEART_CENTRE + [4.0, 0.0, 0.0])

    def _build_heart(self) -> None:
        patient = self.patient
        size = 1.05 * patient.heart_scale * float(np.cbrt(np.prod(self.torso.scale)))
        rv = size * patient.rv_scale
        turn = np.deg2rad(patient.heart_axis_deg)

        def axis(x: float, y: float, z: float) -> tuple[float, float, float]:
            return (x * np.cos(turn) + z * np.sin(turn), y, z * np.cos(turn) - x * np.sin(turn))

        def chamber(centre: ArrayLike, half: ArrayLike, direction: tuple[float, float, float], by: float) -> Ellipsoid:
            return Ellipsoid.along(self._place_heart(centre), np.asarray(half) * by, direction)

        apex = axis(0.74, -0.46, -0.49)
        self.chambers: dict[str, list[Ellipsoid]] = {
            "left_ventricle_wall": [chamber([41, -17, -56], [49, 33, 34], apex, size)],
            "left_ventricle": [chamber([37, -15, -52], [40, 21.5, 22.5], apex, size)],
            "right_ventricle": [
                chamber([14, -43, -60], [43, 24, 27], axis(0.80, -0.30, -0.52), rv),
                chamber([6, -44, -40], [24, 20, 30], axis(0.3, -0.2, 0.9), rv),
            ],
            "right_atrium": [chamber([-29, -19, -40], [25, 26, 34], axis(0.0, 0.0, 1.0), 0.5 * (size + rv))],
            "left_atrium": [
                chamber([4, 15, -21], [35, 18, 23], axis(1.0, 0.0, 0.1), size),
                chamber([32, -2, -14], [13, 11, 10], axis(0.6, -0.7, 0.2), size),
            ],
        }
        self.outflow = Tube.through(
            "right_ventricle",
            np.stack([*self._place_heart([[8, -48, -38], [13, -48, -20]]), self.place([17, -42, -4])]),
            np.array([17.0, 14.5, 0.5 * patient.pa_diameter_mm]) * [size, size, 1.0],
        )

    def _build_tubes(self) -> None:
        patient, place, heart = self.patient, self.place, self._place_heart
        s = float(np.cbrt(np.prod(self.torso.scale)))
        pa, ao = 0.5 * patient.pa_diameter_mm, 0.5 * patient.aorta_diameter_mm
        spine = self.torso.spine_y

        def beside_spine(x: float, z: float, front: float) -> np.ndarray:
            """A point in front of the vertebral body at height ``z`` (reference mm)."""
            z_mm = z * self.torso.scale[2]
            return np.array([x * self.torso.scale[0], float(spine(np.array(z_mm))) - front * self.torso.scale[1], z_mm])

        # where vessels and bronchi enter the lungs
        self.hila = {
            "artery_right": place([-45, 1, 6]),
            "artery_left": place([47, 25, 3]),
            "airway_right": place([-43, 19, 6]),
            "airway_left": place([45, 21, -9]),
            "veins_right": place([[-50, -8, -2], [-52, 26, -36]]),
            "veins_left": place([[53, 0, -6], [53, 36, -34]]),
        }
        branch = 0.78 * pa
        knots = [place([17, -42, -6]), place([20, -34, 8]), place([21, -22, 17])]
        trunk = Tube.through("pulmonary_artery", knots, pa)
        knots = [place([21, -23, 16]), place([6, -10, 14]), place([-18, 1, 9]), self.hila["artery_right"]]
        right = Tube.through("pulmonary_artery", knots, [0.9 * pa, branch, branch, 0.66 * pa])
        knots = [place([21, -24, 16]), place([31, -6, 20]), place([42, 14, 16]), self.hila["artery_left"]]
        left = Tube.through("pulmonary_artery", knots, [0.9 * pa, branch, branch, 0.64 * pa])
        self.pulmonary_trunks = [trunk, right, left]

        arch = [place([-13, -27, 8]), place([-14, -26, 32]), place([-6, -14, 54]), place([12, 12, 64])]
        descent = [beside_spine(25, z, f) for z, f in ((44, 20), (15, 11), (-60, 15), (-120, 22), (-200, 27))]
        descent.append(beside_spine(3, -330, 30))
        course = np.stack([*heart([[12, -19, -36], [0, -22, -16]]), *arch, *descent])
        radii = ao * np.array([0.95, 1.12, 1.0, 1.0, 0.95, 0.86, 0.8, 0.76, 0.72, 0.68, 0.64, 0.6])
        aorta = Tube.through("aorta", course, radii)
        neck = [
            Tube.through(
                "aorta", place([[-6, -13, 54], [-14, -10, 82], [-26, 0, 110], [-30, 8, 300]]), [7, 6.5, 4.5, 3.5]
            ),
            Tube.through("aorta", place([[6, 1, 60], [10, 4, 90], [22, 6, 125], [26, 10, 300]]), [5, 4, 3.8, 3.5]),
            Tube.through("aorta", place([[15, 14, 60], [22, 20, 88], [36, 20, 112], [66, 4, 128]]), [6, 5, 4.5, 4]),
        ]
        cava = [
            Tube.through(
                "superior_vena_cava",
                np.stack([*place([[-23, -19, 76], [-24, -17, 35]]), *heart([[-28, -16, -18]])]),
                8.6 * s,
            ),
            Tube.through(
                "superior_vena_cava", place([[-23, -19, 74], [-27, -14, 98], [-52, -8, 118], [-90, -2, 124]]), 6.5 * s
            ),
            Tube.through(
                "superior_vena_cava", place([[-22, -19, 74], [4, -33, 82], [30, -24, 98], [60, -12, 116]]), 5.8 * s
            ),
        ]
        course = np.stack(
            [heart([-28, -8, -62]), *place([[-24, 12, -92], [-22, 24, -130], [-20, 30, -230], [-20, 32, -340]])]
        )
        inferior = Tube.through("inferior_vena_cava", course, 10.5 * s)
        veins = []
        for side, roots in ((-1, self.hila["veins_right"]), (1, self.hila["veins_left"])):
            inner = heart([[side * 24 + 4, 12, -12], [side * 24 + 4, 20, -27]])
            for start, end in zip(inner, roots, strict=True):
                veins.append(Tube.through("pulmonary_vein", [start, end], [8.0 * s, 6.2 * s]))
        gullet = [beside_spine(x, z, f) for x, z, f in ((0, 300, 22), (2, 100, 22), (5, 40, 24), (4, -60, 24))]
        gullet.append(place([20, 12, -125]))
        oesophagus = Tube.through("oesophagus", np.stack(gullet), 6.5 * s)
        self.tubes = [oesophagus, *cava, inferior, *veins, aorta, *neck, *self.pulmonary_trunks]

        carina = place([2, 15, 37])
        self.airways = [
            Tube.through(
                "airway", [*place([[0, 4, 300], [0, 5, 150], [0, 7, 110]]), carina], np.array([8.6, 8.6, 8.8, 8.6]) * s
            ),
            Tube.through(
                "airway", [carina, place([-20, 19, 22]), self.hila["airway_right"]], np.array([7.4, 7.2, 6.2]) * s
            ),
            Tube.through(
                "airway", [carina, place([22, 22, 17]), self.hila["airway_left"]], np.array([6.8, 6.4, 5.6]) * s
            ),
        ]

    def _build_abdomen(self) -> None:
        sx, sy, sz = self.torso.scale
        left = self.torso.dome_left_mm
        right = self.torso.dome_right_mm
        self.organs: dict[str, list[Ellipsoid]] = {
            "stomach": [
                Ellipsoid.along([60 * sx, -12 * sy, left - 46 * sz], [44 * sx, 46 * sy, 38 * sz]),
                Ellipsoid.along([34 * sx, -44 * sy, left - 92 * sz], [30 * sx, 26 * sy, 46 * sz]),
            ],
            "spleen": [Ellipsoid.along([100 * sx, 40 * sy, left - 58 * sz], [24, 40 * sy, 48 * sz])],
            "kidney": [
                Ellipsoid.along([-62 * sx, 44 * sy, right - 160 * sz], [28, 26, 52 * sz]),
                Ellipsoid.along([62 * sx, 44 * sy, left - 138 * sz], [28, 26, 52 * sz]),
            ],
        }
        self.gas_level_mm = -22.0 * sy

    def liver_distance(self, x: np.ndarray, y: np.ndarray, z: np.ndarray, abdomen: np.ndarray) -> np.ndarray:
        """Distance (mm) from the liver: the right of ``abdomen``, the distance from the space under the diaphragm."""
        sx, sy, sz = self.torso.scale
        below = np.maximum(self.torso.dome_right_mm - 55.0 * sz - z, 0.0)
        # the left lobe reaches across in front; the lower edge rises from right to left
        edge = ((x / sx - 22.0) * 0.80 + (y / sy + 20.0) * 0.60) + 0.45 * below / sz
        bottom = self.torso.dome_right_mm - 165.0 * sz - z
        return np.asarray(np.maximum(np.maximum(abdomen, edge), bottom), dtype=np.float32)

    def heart_distance(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Distance (mm) from the smooth union of the chambers."""
        out: np.ndarray | None = None
        for name, parts in self.chambers.items():
            for part in parts:
                if name != "left_ventricle":
                    field = part.distance(x, y, z)
                    out = field if out is None else smooth_minimum(out, field, 16.0)
        assert out is not None
        return smooth_minimum(out, self.outflow.distance(x, y, z), 12.0)

    def heart_bounds(self, margin_mm: float) -> tuple[np.ndarray, np.ndarray]:
        """Corners (x, y, z) in mm of the box around the heart."""
        boxes = [part.bounds(margin_mm) for parts in self.chambers.values() for part in parts]
        low, high = np.min([b[0] for b in boxes], axis=0), np.max([b[1] for b in boxes], axis=0)
        reach = self.outflow.radii.max() + margin_mm
        return np.minimum(low, self.outflow.points.min(axis=0) - reach), np.maximum(
            high, self.outflow.points.max(axis=0) + reach
        )

    def lung_distance(self, points: np.ndarray) -> np.ndarray:
        """Distance (mm) of points (N, 3) from the lungs of both sides."""
        x, y, z = points.T.astype(np.float32)
        cavity = self.torso.distance("cavity", x, y, z)
        out = self.torso.pleura_distance(x, y, z, cavity)
        np.maximum(out, -self.torso.midline_distance(x, y, z), out=out)
        keep = np.flatnonzero(out < 0)
        x, y, z = x[keep], y[keep], z[keep]
        solid = self.heart_distance(x, y, z) - PERICARDIUM_MM
        for tube in (*self.tubes, *self.airways):
            low, high = tube.bounds(SHEATH_MM)
            near = np.flatnonzero(((points[keep] > low) & (points[keep] < high)).all(axis=1))
            if len(near):
                field = tube.distance(x[near], y[near], z[near]) - np.float32(SHEATH_MM)
                solid[near] = np.minimum(solid[near], field)
        out[keep] = np.maximum(out[keep], -solid)
        return out

    def _build_fissures(self, rng: np.random.Generator) -> list[tuple[str, np.ndarray, float]]:
        """(lung, unit normal, offset in mm) of the fissures: planes with n . p = offset."""
        fissures = []
        for lung in ("lung_right", "lung_left"):
            normal = np.array([rng.normal(0.0, 0.06), -0.66 + rng.normal(0.0, 0.04), -0.75])
            normal /= np.linalg.norm(normal)
            at = self.place([0.0, 20.0, -2.0 + rng.normal(0.0, 6.0)])
            fissures.append((lung, normal, float(normal @ at)))
        normal = np.array([rng.normal(0.0, 0.08), rng.normal(0.0, 0.08), 1.0])
        normal /= np.linalg.norm(normal)
        fissures.append(("minor", normal, float(normal @ self.place([-70.0, -40.0, 2.0 + rng.normal(0.0, 5.0)]))))
        return fissures
