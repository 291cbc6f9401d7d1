"""PNG panels of a reconstruction beside its original: three planes, and the signed error in HU.

Drawn with numpy and Pillow alone: quick to import, the same pixels every time, and fit for TensorBoard. Radiological
display: patient's right on the left of the image, anterior up in axial planes, superior up in the others, true
proportions in mm.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dataset.atomic import atomic_write
from errors import InputError
from params import MEDIASTINUM_WINDOW

_GAP_PX, _MARGIN_PX, _FONT_PX, _BAR_PX = 6, 4, 13, 12
_MIN_TILE_PX = 8
# name, array axis that is looked along, superior must be turned up, letters at left, right, top, bottom
_PLANES = (("axial", 0, False, "RLAP"), ("coronal", 1, True, "RLSI"), ("sagittal", 2, True, "APSI"))
# Signed error: blue too dark, white right, red too dense (endpoints and middle of ColorBrewer's RdBu).
_ERROR_COLOURS = np.array([[5, 48, 97], [67, 147, 195], [247, 247, 247], [214, 96, 77], [103, 0, 31]], dtype=np.float64)


def comparison_panel(
    original_hu: np.ndarray,
    reconstruction_hu: np.ndarray,
    spacing_dhw_mm: Sequence[float],
    path: str | os.PathLike[str],
    *,
    window: tuple[float, float] = MEDIASTINUM_WINDOW,
    titles: tuple[str, str] = ("original", "reconstruction"),
    error_range_hu: float = 300.0,
    tile_px: int = 320,
) -> None:
    """Write `panel_image` to ``path`` as PNG, atomically; arguments and errors as there.

    Raises:
        StorageError: the disk refuses.
    """
    image = panel_image(
        original_hu,
        reconstruction_hu,
        spacing_dhw_mm,
        window=window,
        titles=titles,
        error_range_hu=error_range_hu,
        tile_px=tile_px,
    )
    save_panel(image, path)


def save_panel(image: np.ndarray, path: str | os.PathLike[str]) -> None:
    """Write uint8 (height, width, 3) as PNG, atomically.

    Raises:
        StorageError: the disk refuses.
    """
    with atomic_write(path) as handle:
        Image.fromarray(image).save(handle, format="PNG")


def panel_image(
    original_hu: np.ndarray,
    reconstruction_hu: np.ndarray,
    spacing_dhw_mm: Sequence[float],
    *,
    window: tuple[float, float] = MEDIASTINUM_WINDOW,
    titles: tuple[str, str] = ("original", "reconstruction"),
    error_range_hu: float = 300.0,
    tile_px: int = 320,
    position_dhw: Sequence[int] | None = None,
) -> np.ndarray:
    """Rows: an axial, a coronal and a sagittal plane. Columns: original, reconstruction, signed error.

    Args:
        original_hu: (D, H, W) on the standard axes, any real dtype, HU; planes are read one at a time.
        reconstruction_hu: the same shape; NaN is drawn as magenta.
        spacing_dhw_mm: voxel spacing.
        window: display window (level, width) in HU.
        titles: names of the first two columns.
        error_range_hu: the error's colours saturate at ± this; fixed, so that panels can be compared.
        tile_px: pixels of the volume's longest side.
        position_dhw: the voxel (d, h, w) that the planes pass through; None: the middle of the volume.

    Returns:
        uint8 (height, width, 3) RGB.

    Raises:
        InputError: shapes differ, are not 3D, the spacing or a range is not positive, or the position is outside.
    """
    if original_hu.shape != reconstruction_hu.shape or original_hu.ndim != 3 or 0 in original_hu.shape:
        raise InputError(
            f"original {original_hu.shape} and reconstruction {reconstruction_hu.shape}: two volumes on one grid needed"
        )
    if len(spacing_dhw_mm) != 3 or not all(0 < mm < math.inf for mm in spacing_dhw_mm):
        raise InputError(f"spacing {list(spacing_dhw_mm)} mm: three positive numbers are needed")
    if not (window[1] > 0 and error_range_hu > 0):
        raise InputError(f"window width {window[1]} and error range {error_range_hu} HU must be positive")
    position = [count // 2 for count in original_hu.shape] if position_dhw is None else list(position_dhw)
    if len(position) != 3 or not all(0 <= at < count for at, count in zip(position, original_hu.shape, strict=True)):
        raise InputError(f"position {position} [D, H, W] is not a voxel of a volume of {list(original_hu.shape)}")

    extent_mm = [count * mm for count, mm in zip(original_hu.shape, spacing_dhw_mm, strict=True)]
    px_per_mm = tile_px / max(extent_mm)
    rows = []
    for name, axis, turn_up, letters in _PLANES:
        planes = [_plane(volume, axis, position[axis], turn_up) for volume in (original_hu, reconstruction_hu)]
        height_mm, width_mm = (mm for other, mm in enumerate(extent_mm) if other != axis)
        size = (max(round(width_mm * px_per_mm), _MIN_TILE_PX), max(round(height_mm * px_per_mm), _MIN_TILE_PX))
        error_hu = planes[1] - planes[0]
        tiles = [_grey(_resize(plane, size), window) for plane in planes]
        tiles.append(_signed_colours(_resize(error_hu, size), error_range_hu))
        captions = (f"{name} {position[axis]}", "", _error_caption(error_hu))
        # the error's caption needs the room of the letters, which stand beside it twice anyway
        marks = (letters, letters, "")
        rows.append([_annotate(*annotated) for annotated in zip(tiles, marks, captions, strict=True)])
    level, width = window
    headings = [f"{titles[0]}  (L {level:g} W {width:g} HU)", titles[1], f"{titles[1]} - {titles[0]}"]
    return _compose(rows, headings, error_range_hu)


def _plane(volume_hu: np.ndarray, axis: int, place: int, turn_up: bool) -> np.ndarray:
    """float32 (rows, columns) as displayed: D grows towards superior but image rows grow downwards."""
    at: tuple[slice | int, ...] = (*(slice(None),) * axis, place)
    plane = np.asarray(volume_hu[at]).astype(np.float32)
    return plane[::-1] if turn_up else plane


def _resize(plane: np.ndarray, size_px: tuple[int, int]) -> np.ndarray:
    """Bilinear in HU, before the window clips; Pillow widens its kernel when shrinking, so nothing aliases."""
    image = Image.fromarray(np.ascontiguousarray(plane))
    return np.asarray(image.resize(size_px, Image.Resampling.BILINEAR))


def _grey(plane_hu: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    level, width = window
    unit = np.clip((plane_hu - (level - width / 2)) / width, 0, 1)
    return _mark_nan(np.repeat((unit * 255)[..., None], 3, axis=2), plane_hu)


def _signed_colours(error_hu: np.ndarray, range_hu: float) -> np.ndarray:
    position = np.clip(error_hu / range_hu, -1, 1)
    stops = np.linspace(-1, 1, len(_ERROR_COLOURS))
    finite = np.nan_to_num(position)
    colours = np.stack([np.interp(finite, stops, _ERROR_COLOURS[:, channel]) for channel in range(3)], axis=-1)
    return _mark_nan(colours, error_hu)


def _mark_nan(colours: np.ndarray, values: np.ndarray) -> np.ndarray:
    colours = np.where(np.isfinite(values)[..., None], colours, (255.0, 0.0, 255.0))
    return np.rint(colours).astype(np.uint8)


def _error_caption(error_hu: np.ndarray) -> str:
    return f"MAE {np.abs(error_hu).mean():.1f}  bias {error_hu.mean():+.1f} HU"


def _annotate(tile: np.ndarray, letters: str, text: str) -> Image.Image:
    """Orientation letters (none, or four) at the middle of each edge and a caption in the upper left corner."""
    image = Image.fromarray(tile)
    width, height = image.size
    places = (
        ((2, height / 2), "lm"),
        ((width - 2, height / 2), "rm"),
        ((width / 2, 1), "ma"),
        ((width / 2, height - 1), "md"),
    )
    draw = ImageDraw.Draw(image)
    for letter, (place, anchor) in zip(letters, places, strict=False):
        _text(draw, place, letter, anchor)
    _text(draw, (3, 1), text, "la")
    return image


def _text(draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, anchor: str) -> None:
    """Yellow on a black plate: an outline alone is not read on the white of an error map."""
    if not text:
        return
    font = ImageFont.load_default(_FONT_PX)
    left, top, right, bottom = draw.textbbox(place, text, font=font, anchor=anchor)
    draw.rectangle((left - 2, top - 1, right + 1, bottom + 1), fill=(0, 0, 0))
    draw.text(place, text, fill=(255, 220, 0), font=font, anchor=anchor)


def _compose(rows: list[list[Image.Image]], headings: list[str], error_range_hu: float) -> np.ndarray:
    """Tile rows on black: headings above, the scale of the error below the last column."""
    line_px = _FONT_PX + 2 * _MARGIN_PX
    column_px = max(tile.width for row in rows for tile in row)
    width = 3 * column_px + 2 * _GAP_PX
    height = line_px + sum(row[0].height + _GAP_PX for row in rows) + _BAR_PX + line_px
    canvas = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(canvas)
    lefts = [column * (column_px + _GAP_PX) for column in range(3)]
    for left, heading in zip(lefts, headings, strict=True):
        _text(draw, (left + _MARGIN_PX, _MARGIN_PX), heading, "la")
    top = line_px
    for row in rows:
        for left, tile in zip(lefts, row, strict=True):
            canvas.paste(tile, (left + (column_px - tile.width) // 2, top))
        top += row[0].height + _GAP_PX
    ramp_hu = np.linspace(-error_range_hu, error_range_hu, column_px)[None].repeat(_BAR_PX, axis=0)
    canvas.paste(Image.fromarray(_signed_colours(ramp_hu, error_range_hu)), (lefts[2], top))
    for place, text, anchor in (
        (0, f"{-error_range_hu:g}", "la"),
        (column_px // 2, "0 HU", "ma"),
        (column_px - 1, f"+{error_range_hu:g}", "ra"),
    ):
        _text(draw, (lefts[2] + place, top + _BAR_PX + 2), text, anchor)
    return np.asarray(canvas)
