"""A picture of a generated volume: three planes in two windows, marked as synthetic."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ddpm.ctpa_volume import NOTICE
from evaluation.panels import panel_image
from params import LUNG_WINDOW, MEDIASTINUM_WINDOW

_TILE_PX, _GAP_PX, _FONT_PX = 320, 6, 15
_SPREAD_WINDOW = (150.0, 300.0)


def volume_panel(hu: np.ndarray, spread_hu: np.ndarray | None, spacing_dhw_mm: Sequence[float]) -> np.ndarray:
    """Columns: lung window, mediastinal window, and where it is given the spread; rows as in `panel_image`.

    Args:
        hu: (D, H, W) HU on the standard axes.
        spread_hu: the same shape, standard deviation over samples; None for a single sample.
        spacing_dhw_mm: voxel spacing.

    Returns:
        uint8 (height, width, 3) RGB.
    """
    columns = [
        _column(hu, spacing_dhw_mm, LUNG_WINDOW, "lung"),
        _column(hu, spacing_dhw_mm, MEDIASTINUM_WINDOW, "soft"),
    ]
    if spread_hu is not None:
        columns.append(_column(spread_hu, spacing_dhw_mm, _SPREAD_WINDOW, "spread"))
    gap = np.zeros((len(columns[0]), _GAP_PX, 3), dtype=np.uint8)
    joined = np.concatenate([part for column in columns for part in (column, gap)][:-1], axis=1)
    font = ImageFont.load_default(_FONT_PX)
    line = Image.new("RGB", (joined.shape[1], 2 * _FONT_PX))
    ImageDraw.Draw(line).text((joined.shape[1] / 2, _FONT_PX), NOTICE, fill=(255, 90, 90), font=font, anchor="mm")
    return np.concatenate([np.asarray(line), joined])


def _column(hu: np.ndarray, spacing: Sequence[float], window: tuple[float, float], title: str) -> np.ndarray:
    """The first column of a comparison: the planes of one volume."""
    image = panel_image(hu, hu, spacing, window=window, titles=(title, ""), tile_px=_TILE_PX)
    extents_mm = [count * mm for count, mm in zip(hu.shape, spacing, strict=True)]
    return image[:, : round(max(extents_mm[1:]) * _TILE_PX / max(extents_mm))]
