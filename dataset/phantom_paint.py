"""Painting one block of voxels: tissues are mixed in from the skin inwards, by their share of each voxel."""

from __future__ import annotations

import numpy as np

from dataset.phantom_anatomy import PERICARDIUM_MM, SHEATH_MM, Anatomy
from dataset.phantom_bones import sternum, vertebral_column
from dataset.phantom_labels import LABELS
from dataset.phantom_shapes import FAR_MM, Box, Grid, Tube, coverage, smooth_minimum, smoothstep
from dataset.phantom_splat import Segments, splat
from params import HU_AIR

MUSCLE_HU = 52.0
WHOLE = (slice(None), slice(None), slice(None))
VESSEL_WALL_MM = 1.1
FILLET_MM = 9.0  # fat that rounds off the corners between neighbouring organs of the mediastinum
AIRWAY_WALL_MM = 1.4


class Block:
    """One block of voxels while it is painted."""

    def __init__(self, anatomy: Anatomy, grid: Grid) -> None:
        self.anatomy, self.patient, self.torso, self.grid = anatomy, anatomy.patient, anatomy.torso, grid
        self.xyz = grid.coordinates()
        self.labels = np.zeros(grid.shape, dtype=np.uint8)
        self.skin_mm = self.torso.body_distance(grid)
        self.cavity_mm = self.torso.distance("cavity", *self.xyz)
        self.in_body = coverage(self.skin_mm, grid.edge_mm)
        margin = SHEATH_MM + FILLET_MM + grid.edge_mm
        self.tubes = self._rasterise(anatomy.tubes, margin)
        self.airways = self._rasterise(anatomy.airways, margin)
        low, high = anatomy.heart_bounds(16.0)
        self.heart_box = grid.box(low, high)
        self.heart_mm = None if self.heart_box is None else anatomy.heart_distance(*grid.coordinates(self.heart_box))

    def _rasterise(self, tubes: list[Tube], margin_mm: float) -> list[tuple[Tube, Box, np.ndarray]]:
        found = ((tube, tube.rasterise(self.grid, margin_mm)) for tube in tubes)
        return [(tube, *result) for tube, result in found if result is not None]

    def paint(self, share: np.ndarray, hu: np.ndarray | float, name: str | None, box: Box = WHOLE) -> None:
        """Mix ``share`` of a tissue into a box; the class goes to whoever has more than half of a voxel."""
        view = self.hu[box]
        view += share * (hu - view)
        if name is not None:
            self.labels[box][share > 0.5] = LABELS[name]

    def cover(self, distance_mm: np.ndarray) -> np.ndarray:
        """Share of the voxel inside a surface."""
        return coverage(distance_mm, self.grid.edge_mm)

    def noise_gain(self) -> np.ndarray:
        """(D, H, W) float32, see ``Renderer.render``."""
        gain = np.clip(self.skin_mm * np.float32(-1.0 / 160.0), 0.0, 0.6)
        gain += np.float32(0.75)
        gain *= self.in_body
        return np.maximum(gain, np.float32(0.25), out=gain)

    def paint_walls(self, texture: dict[str, np.ndarray]) -> None:
        """Skin, subcutaneous fat, glandular tissue and the muscles around the chest."""
        fat = self.patient.fat_hu
        self.hu = np.full(self.grid.shape, HU_AIR, dtype=np.float32)
        self.paint(self.in_body, fat + 6.0 * texture["medium"], "fat")
        self.paint(self.in_body - self.cover(self.skin_mm + np.float32(1.8)), 25.0, "skin")
        for breast in self.torso.breasts:
            box = self.grid.box(*breast.bounds(0.0))
            if box is None:
                continue
            inner = breast.distance(*self.grid.coordinates(box)) + np.float32(0.25 * self.patient.breast_mm)
            gland = smoothstep(texture["medium"][box], 1.3 - 2.2 * self.patient.breast_density, 2.2)
            self.paint(self.cover(inner) * gland, 35.0, "breast", box)
        muscle_mm = self.torso.distance("muscle", *self.xyz)
        # sheets of fat part the muscles of the chest wall; strands run through them
        sheet = np.exp(-np.square((muscle_mm + np.float32(10.0)) * np.float32(0.55)))
        sheet *= smoothstep(texture["coarse"], -0.9, 0.4)
        sheet *= smoothstep(self.cavity_mm, 8.0, 14.0)
        sheet = np.maximum(sheet, 0.8 * smoothstep(texture["medium"], 1.3, 2.4), out=sheet)
        share = self.cover(muscle_mm)
        self.paint(share, MUSCLE_HU + sheet * (fat - MUSCLE_HU), "muscle")
        self.labels[(sheet > 0.6) & (share > 0.5)] = LABELS["fat"]
        # what fills the cavity where there is no organ: fat, in the neck more and more muscle
        neck = smoothstep(self.xyz[2], self.torso.apex_mm - 8.0, self.torso.apex_mm + 22.0)
        inside = self.cover(self.cavity_mm)
        strands = np.maximum(
            0.35 * smoothstep(texture["medium"], 0.3, 2.2), neck * smoothstep(texture["coarse"], -1.2, -0.2)
        )
        self.paint(inside, fat + strands * (MUSCLE_HU - fat), "fat")
        self.labels[(strands > 0.5) & (inside > 0.5)] = LABELS["muscle"]

    def paint_abdomen(self, texture: dict[str, np.ndarray]) -> None:
        """The diaphragm and what lies under it."""
        grid, anatomy = self.grid, self.anatomy
        n = int(np.searchsorted(grid.z, self.torso.dome_right_mm + 4.0 + grid.edge_mm))
        if n == 0:
            return
        box = (slice(0, n), slice(None), slice(None))
        x, y, z = grid.coordinates(box)
        height, cosine = self.torso.diaphragm(x, y)
        under = (z - height) * cosine
        cavity = self.cavity_mm[box]
        self.paint(self.cover(np.maximum(under, cavity)), 48.0, "muscle", box)
        space = np.maximum(under + np.float32(2.5), cavity + np.float32(2.0))
        bowel = smoothstep(texture["coarse"][box], 0.1, 0.5) * smoothstep(
            z, self.torso.dome_left_mm - 70.0, self.torso.dome_left_mm - 95.0
        )
        fat = self.patient.fat_hu
        share = self.cover(space)
        self.paint(share, fat + bowel * (35.0 - fat), "fat", box)
        self.labels[box][(bowel > 0.5) & (share > 0.5)] = LABELS["muscle"]
        liver = anatomy.liver_distance(x, y, z, space + np.float32(0.5))
        self.paint(self.cover(liver), 72.0 + 5.0 * texture["medium"][box], "liver", box)
        hu: dict[str, float | np.ndarray] = {
            "stomach": 38.0,
            "spleen": 105.0 + 10.0 * texture["medium"],
            "kidney": 120.0,
        }
        for name, parts in anatomy.organs.items():
            for part in parts:
                local = grid.box(*part.bounds(grid.edge_mm))
                if local is None:
                    continue
                coordinates = grid.coordinates(local)
                distance = np.maximum(part.distance(*coordinates), self.cavity_mm[local] + np.float32(3.0))
                height, cosine = self.torso.diaphragm(*coordinates[:2])
                distance = np.maximum(distance, (coordinates[2] - height) * cosine + np.float32(3.5))
                value = hu[name]
                self.paint(self.cover(distance), value[local] if isinstance(value, np.ndarray) else value, name, local)
                if name == "stomach":
                    gas = np.maximum(distance + np.float32(4.0), coordinates[1] - np.float32(anatomy.gas_level_mm))
                    self.paint(self.cover(gas), -990.0, "stomach_gas", local)

    def paint_lungs(self, texture: dict[str, np.ndarray]) -> None:
        """Parenchyma with its gravity gradient, fissures, pleural fluid."""
        x, y, z = self.xyz
        grid, patient, torso = self.grid, self.patient, self.torso
        pleura = torso.pleura_distance(x, y, z, self.cavity_mm)
        self.in_pleura = self.cover(pleura)
        solid = torso.midline_distance(x, y, z)
        if self.heart_box is not None and self.heart_mm is not None:
            view = solid[self.heart_box]
            view[...] = smooth_minimum(view, self.heart_mm - np.float32(PERICARDIUM_MM), 2.0 * FILLET_MM)
        for _, box, field in (*self.tubes, *self.airways):
            view = solid[box]
            view[...] = smooth_minimum(view, field - np.float32(SHEATH_MM), FILLET_MM)
        lung = np.maximum(pleura, -solid, out=solid)
        share = self.cover(lung)

        back = y / (90.0 * torso.scale[1])
        hu = patient.lung_hu + np.float32(0.5 * patient.lung_gradient_hu) * back.astype(np.float32)
        # the lowest millimetres at the back are badly aired
        hu = hu + 70.0 * np.exp(np.minimum(self.cavity_mm, 0.0) / 7.0) * smoothstep(back, 0.35, 0.9)
        hu += 9.0 * texture["coarse"]
        hu += 11.0 * texture["medium"]
        hu += 14.0 * texture["fine"]
        self._add_fissures(hu)
        right = np.broadcast_to(x < 0, grid.shape)
        self.paint(share, hu, "lung_left")
        self.labels[(share > 0.5) & right] = LABELS["lung_right"]
        self.fluid = np.zeros((1, 1, 1), dtype=np.float32)
        for side, depth in ((right, patient.effusion_right_mm), (~right, patient.effusion_left_mm)):
            if depth > 0.0:
                # a crescent at the back that thins upwards
                here = depth * smoothstep(z, 70.0 * torso.scale[2], torso.dome_right_mm - 10.0)
                wall = torso.axes("cavity", z.astype(np.float64))[2]
                level = wall - here.astype(np.float32) - y + np.float32(6.0) * np.square(x / np.float32(100.0))
                self.fluid = self.fluid + self.cover(np.maximum(lung, level)) * side

    def _add_fissures(self, hu: np.ndarray) -> None:
        """Fissures are sheets of half a millimetre of tissue, whatever the voxel."""
        x, y, z = self.xyz
        width = self.grid.edge_mm
        height: dict[str, np.ndarray] = {}
        bow = np.sin(x / np.float32(21.0)) * np.cos(y / np.float32(29.0))
        for name, normal, offset in self.anatomy.fissures:
            n = normal.astype(np.float32)
            plane = (x * n[0] + (y * n[1] - np.float32(offset)) + bow * np.float32(10.0)) + z * n[2]
            sheet = np.abs(plane) * np.float32(-1.0 / width)
            sheet += np.float32(1.0)
            np.maximum(sheet, 0.0, out=sheet)
            sheet *= np.float32(min(1.0, 0.4 / width) * 800.0)
            if name == "minor":
                # in the right lung, in front of the oblique fissure
                sheet *= (height["lung_right"] < 0) & (x < 0)
            else:
                height[name] = -plane
                sheet *= (x < 0) if name == "lung_right" else (x >= 0)
            hu += sheet

    def paint_trees(self, blood_hu: dict[str, float]) -> None:
        """Veins, bronchi and arteries of the lungs."""
        trees = self.anatomy.trees
        if self.fluid.size > 1:
            self.paint(self.fluid, 12.0, "effusion")
        aired = self.in_pleura * (1.0 - self.fluid)

        def share(segments: Segments) -> np.ndarray:
            return splat(segments, self.grid) * aired

        self.paint(share(trees.veins), blood_hu["pulmonary_vein"], "pulmonary_vein")
        self.paint(share(trees.bronchi.thickened(1.12, 0.45)), 10.0, None)
        self.paint(share(trees.bronchi), -970.0, "airway")
        self.artery_share = share(trees.arteries)
        self.paint(self.artery_share, blood_hu["pulmonary_artery"], "pulmonary_artery")

    def paint_bones(self, texture: dict[str, np.ndarray]) -> None:
        """A dense shell around marrow; discs and cartilage are softer."""
        grid, bones, gain = self.grid, self.anatomy.bones, self.patient.bone_gain
        for tube, box, field in self._rasterise(bones.cartilages, grid.edge_mm):
            self.paint(self.cover(field), 95.0 + 25.0 * gain, tube.name, box)
        bone = np.full(grid.shape, FAR_MM, dtype=np.float32)
        parts: list[tuple[str, Box, np.ndarray]] = []
        column = vertebral_column(self.torso, grid)
        if column is not None:
            box, vertebra, disc, canal = column
            self.paint(self.cover(canal), 32.0, "muscle", box)
            self.paint(self.cover(disc), 85.0, "cartilage", box)
            parts.append(("spine", box, vertebra))
        plate = sternum(self.torso, grid)
        if plate is not None:
            parts.append(("sternum", *plate))
        for name, blade in bones.plates:
            box_or_none = grid.box(*blade.bounds(grid.edge_mm))
            if box_or_none is not None:
                parts.append((name, box_or_none, blade.distance(*grid.coordinates(box_or_none))))
        parts += [(tube.name, box, field) for tube, box, field in self._rasterise(bones.tubes, grid.edge_mm)]
        for name, box, field in parts:
            view = bone[box]
            np.minimum(view, field, out=view)
            self.labels[box][(field < 0) & (self.skin_mm[box] < -3.0)] = LABELS[name]
        # thin patients have bones under the skin, never outside it
        np.maximum(bone, self.skin_mm + np.float32(3.0), out=bone)
        at = np.nonzero(bone < 0.5 * grid.edge_mm)
        distance = bone[at]
        shell = np.exp(-np.square(np.minimum(distance + np.float32(0.6), 0.0) * np.float32(0.5)))
        marrow = 170.0 + 55.0 * texture["fine"][at] + 25.0 * texture["medium"][at]
        here = self.hu[at]
        self.hu[at] = here + self.cover(distance) * (gain * (marrow + (760.0 - marrow) * shell) - here)

    def paint_heart(self, blood_hu: dict[str, float], texture: dict[str, np.ndarray]) -> None:
        """Walls, then cavities."""
        if self.heart_box is None or self.heart_mm is None:
            return
        box, anatomy = self.heart_box, self.anatomy
        x, y, z = self.grid.coordinates(box)
        fields = {}
        for name, parts in anatomy.chambers.items():
            distances = [part.distance(x, y, z) for part in parts]
            fields[name] = np.minimum.reduce(distances)
        rv, lv_wall = fields["right_ventricle"], fields["left_ventricle_wall"]
        np.minimum(rv, anatomy.outflow.distance(x, y, z), out=rv)
        septum = np.float32(1.5)
        rv = np.maximum(rv, septum - lv_wall)
        ra = np.maximum(fields["right_atrium"], np.maximum(2.0 - fields["left_atrium"], 2.5 - rv))
        ra = np.maximum(ra, septum - lv_wall)
        la = np.maximum(fields["left_atrium"], 2.0 - lv_wall)
        lv = fields["left_ventricle"]
        atria = np.minimum(ra, la) - np.float32(1.8)
        wall = np.minimum(np.minimum(lv_wall, rv - np.float32(3.2)), atria)
        myocardium = 62.0 + 0.16 * self.patient.aorta_hu
        # epicardial fat first: it also hides the vessels of the lungs that would cross
        self.paint(self.cover(self.heart_mm - np.float32(2.5)), self.patient.fat_hu + 8.0, "fat", box)
        self.paint(self.cover(wall), myocardium + 5.0 * texture["medium"][box], "myocardium", box)
        swirl = {"right_atrium": 0.08, "right_ventricle": 0.04}
        for name, field in (("right_atrium", ra), ("right_ventricle", rv), ("left_atrium", la), ("left_ventricle", lv)):
            hu = blood_hu[name] * (1.0 + swirl.get(name, 0.0) * texture["coarse"][box])
            self.paint(self.cover(field), hu, name, box)

    def paint_tubes(self, blood_hu: dict[str, float]) -> None:
        """Great vessels and oesophagus, then trachea and main bronchi, each in a thin wall."""
        chambers = [LABELS[name] for name in ("right_atrium", "right_ventricle", "left_atrium", "left_ventricle")]
        for _, box, field in self.tubes:
            # no wall where a vessel opens into the heart
            closed = ~np.isin(self.labels[box], chambers)
            self.paint(self.cover(field - np.float32(VESSEL_WALL_MM)) * closed, 45.0, "muscle", box)
        for tube, box, field in self.tubes:
            share = self.cover(field)
            self.paint(share, blood_hu[tube.name], tube.name, box)
            if tube.name == "pulmonary_artery":
                view = self.artery_share[box]
                np.maximum(view, share, out=view)
        for _, box, field in self.airways:
            self.paint(self.cover(field - np.float32(AIRWAY_WALL_MM)), 40.0, "muscle", box)
        for tube, box, field in self.airways:
            self.paint(self.cover(field), -985.0, tube.name, box)

    def paint_emboli(self) -> None:
        """Clots displace blood, so they are confined to the arteries."""
        if not len(self.anatomy.emboli.start):
            return
        share = np.minimum(splat(self.anatomy.emboli, self.grid), self.artery_share)
        share *= np.isin(self.labels, [LABELS["pulmonary_artery"]])
        self.paint(share, self.patient.embolus_hu, "embolus")
