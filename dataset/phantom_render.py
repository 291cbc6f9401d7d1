"""From implicit anatomy to voxels: HU, class and noise gain of blocks of slices."""

from __future__ import annotations

import numpy as np

from dataset.phantom_anatomy import Anatomy
from dataset.phantom_paint import Block
from dataset.phantom_shapes import Grid


class Renderer:
    """Paints blocks of one patient; blocks may be rendered in any order and in parallel.

    Args:
        anatomy: the patient.
        y: (H,) mm, of all blocks.
        x: (W,) mm, of all blocks.
    """

    def __init__(self, anatomy: Anatomy, y: np.ndarray, x: np.ndarray) -> None:
        self.anatomy = anatomy
        self._planes = {name: texture.plane(y, x) for name, texture in anatomy.textures.items()}
        patient = anatomy.patient
        mixed = 0.8 * patient.pa_hu + 0.12 * patient.svc_hu
        self.blood_hu = {
            "right_atrium": mixed,
            "right_ventricle": 0.97 * patient.pa_hu,
            "pulmonary_artery": patient.pa_hu,
            "pulmonary_vein": patient.vein_hu,
            "left_atrium": patient.vein_hu,
            "left_ventricle": 0.5 * (patient.vein_hu + patient.aorta_hu),
            "aorta": patient.aorta_hu,
            "superior_vena_cava": patient.svc_hu,
            "inferior_vena_cava": patient.ivc_hu,
            "oesophagus": 38.0,
        }

    def render(self, grid: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Paint one block.

        Returns:
            HU (D, H, W) float32 without noise; classes (D, H, W) uint8; the gain of the noise (D, H, W) float32:
            low in air, 1 under the skin, more in the middle of the body where fewer photons arrive.
        """
        block = Block(self.anatomy, grid)
        texture = {name: field.sample(self._planes[name], grid) for name, field in self.anatomy.textures.items()}
        block.paint_walls(texture)
        block.paint_abdomen(texture)
        block.paint_lungs(texture)
        block.paint_trees(self.blood_hu)
        block.paint_bones(texture)
        block.paint_heart(self.blood_hu, texture)
        block.paint_tubes(self.blood_hu)
        block.paint_emboli()
        texture["fine"] *= 5.0
        texture["fine"] *= block.in_body
        block.hu += texture["fine"]
        return block.hu, block.labels, block.noise_gain()
