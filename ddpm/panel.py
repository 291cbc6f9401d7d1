"""A picture of a sample: the radiographs it was drawn from, beside truth, sample and error on three planes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from evaluation.panels import panel_image
from params import MEDIASTINUM_WINDOW


def sample_panel(
    xrays: np.ndarray, truth_hu: np.ndarray, sample_hu: np.ndarray, spacing_dhw_mm: Sequence[float]
) -> np.ndarray:
    """X-rays above each other on the left, `panel_image` of truth and sample on the right.

    Args:
        xrays: (V, 1, S, S) in [0, 1].
        truth_hu: (D, H, W).
        sample_hu: the same shape.
        spacing_dhw_mm: voxel spacing.

    Returns:
        uint8 (height, width, 3).
    """
    right = panel_image(
        truth_hu, sample_hu, spacing_dhw_mm, window=MEDIASTINUM_WINDOW, titles=("truth", "sample"), tile_px=240
    )
    side = min(right.shape[0] // len(xrays), 320)
    left = np.zeros((right.shape[0], side, 3), dtype=np.uint8)
    for number, xray in enumerate(xrays[:, 0]):
        grey = Image.fromarray(np.rint(255 * np.clip(xray, 0, 1)).astype(np.uint8))
        picture = np.asarray(grey.resize((side, side), Image.Resampling.BILINEAR))
        left[number * side : (number + 1) * side] = picture[..., None]
    return np.concatenate([left, right], axis=1)
