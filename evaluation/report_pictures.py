"""One patient as HTML: radiographs beside projections, three planes with errors, HU histograms, volumes to look into.

Everything is embedded. Radiological display as in `evaluation.panels`: the patient's right on the left of a picture.
"""

from __future__ import annotations

import base64
import io
import math
import tempfile
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.geometry import resample_to_size
from dataset.volume_io import Volume, write_nifti
from evaluation.metrics.projection import radiograph
from evaluation.panels import panel_image
from evaluation.report_cases import GENERATED, RECONSTRUCTION, ReportCase
from evaluation.report_charts import Line, line_chart
from params import LUNG_WINDOW, MEDIASTINUM_WINDOW, PE_WINDOW

WINDOWS = {"mediastinum": MEDIASTINUM_WINDOW, "lung": LUNG_WINDOW, "PE": PE_WINDOW}
# Voxels of an embedded volume: 2 MiB of int16, about half of it when compressed.
MAX_VOXELS = 1 << 20
_TILE_PX = 200
_XRAY_PX = 300
_BIN_HU = 25.0
_SHORT = {RECONSTRUCTION: "reconstructed", GENERATED: "generated"}


def data_uri(pixels: np.ndarray) -> str:
    """uint8 (height, width[, 3]) as a lossless WebP inside a data URI."""
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, format="WEBP", lossless=True, method=4)
    return "data:image/webp;base64," + base64.b64encode(encoded.getvalue()).decode()


def image(pixels: np.ndarray, alternative: str) -> str:
    """An ``img`` with its size, so that a page does not jump."""
    height, width = pixels.shape[:2]
    text = escape(alternative, quote=True)
    return f'<img src="{data_uri(pixels)}" width="{width}" height="{height}" alt="{text}">'


def radiographs(case: ReportCase) -> str:
    """The X-ray a volume was made from, beside the frontal projections of truth and volumes."""
    figures = []
    for view, picture in case.xrays:
        grey = np.rint(255 * np.clip(picture, 0, 1)).astype(np.uint8)
        shown = Image.fromarray(grey).resize((_XRAY_PX, _XRAY_PX), Image.Resampling.BILINEAR)
        figures.append(_figure(image(np.asarray(shown), f"{view} X-ray"), f"X-ray given to the model, {view}"))
    projections = {"true": projection(case.truth_hu, case.spacing_mm)}
    projections |= {_SHORT[role]: projection(hu, case.spacing_mm) for role, hu in case.volumes.items()}
    # one scale for all, so that they compare
    white = float(np.quantile(projections["true"], 0.998)) or 1.0
    for name, values in projections.items():
        grey = np.rint(255 * np.clip(values / white, 0, 1)).astype(np.uint8)
        figures.append(_figure(image(_letterboxed(grey), f"projection, {name}"), f"DRR of the {name} volume"))
    return f'<div class="pictures">{"".join(figures)}</div>'


def projection(hu: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """Frontal parallel projection as displayed: (rows, columns) of one pixel size, superior up, right on the left."""
    integrals = radiograph(np.asarray(hu), spacing_mm)
    height_mm, width_mm = hu.shape[0] * spacing_mm[0], hu.shape[2] * spacing_mm[2]
    scale = _XRAY_PX / max(height_mm, width_mm)
    size = max(8, round(width_mm * scale)), max(8, round(height_mm * scale))
    picture = Image.fromarray(np.ascontiguousarray(integrals, dtype=np.float32))
    return np.asarray(picture.resize(size, Image.Resampling.BILINEAR))


def _letterboxed(grey: np.ndarray) -> np.ndarray:
    """In the middle of a square of black, as the X-ray's own frame is."""
    square = np.zeros((_XRAY_PX, _XRAY_PX), dtype=np.uint8)
    height, width = grey.shape
    top, left = (_XRAY_PX - height) // 2, (_XRAY_PX - width) // 2
    square[top : top + height, left : left + width] = grey
    return square


def planes(case: ReportCase, key: str) -> str:
    """Panels of each volume beside the truth, in three windows that radio buttons choose.

    Args:
        case: whose.
        key: unique on the page, letters and digits.
    """
    buttons, panels = [], []
    for number, (name, window) in enumerate(WINDOWS.items()):
        checked = " checked" if number == 0 else ""
        identity = f"{key}w{number}"
        buttons.append(f'<input type="radio" name="{key}" id="{identity}" class="w{number}"{checked}>')
        buttons.append(f'<label for="{identity}">{escape(name)}</label>')
        shown = []
        for role, volume in case.volumes.items():
            pixels = panel_image(
                case.truth_hu,
                volume,
                case.spacing_mm,
                window=window,
                titles=("truth", _SHORT[role]),
                tile_px=_TILE_PX,
            )
            text = f"Truth, {role} and error in HU on three planes, {name} window"
            shown.append(
                _figure(
                    f'<div class="wide">{image(pixels, text)}</div>', f"Truth, {_SHORT[role]} volume, and its error"
                )
            )
        panels.append(f'<div class="row panels p{number}">{"".join(shown)}</div>')
    return f'<div class="windows">{"".join(buttons)}{"".join(panels)}</div>'


def histogram(case: ReportCase) -> str:
    """Share of voxels by HU, on a log axis, of the truth and each volume."""
    low, high = case.window.min_hu, case.window.max_hu
    edges = np.linspace(low, high, max(2, round((high - low) / _BIN_HU)) + 1)
    lines = []
    for name, hu in [("truth", case.truth_hu), *((_SHORT[role], hu) for role, hu in case.volumes.items())]:
        counts, _ = np.histogram(np.clip(hu, low, high), edges)
        shares = counts / max(1, counts.sum())
        centres = (edges[:-1] + edges[1:]) / 2
        lines.append(Line(name, [(float(x), float(100 * y)) for x, y in zip(centres, shares, strict=True) if y > 0]))
    return line_chart(lines, "HU", f"% of voxels in bins of {edges[1] - edges[0]:g} HU", log_y=True)


def embedded_nifti(hu: np.ndarray, affine: np.ndarray) -> tuple[bytes, tuple[int, int, int]]:
    """A volume as int16 .nii.gz, made smaller where it has more than `MAX_VOXELS`.

    Returns:
        The file, and its shape (D, H, W); axes in the file are (W, H, D) in LPS order.
    """
    shrink = max(1.0, (math.prod(hu.shape) / MAX_VOXELS) ** (1 / 3))
    size = [max(1, int(length / shrink)) for length in hu.shape]
    small, small_affine = (hu, affine) if shrink == 1.0 else resample_to_size(hu, affine, size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "volume.nii.gz"
        write_nifti(path, Volume(np.asarray(small), small_affine))
        d, h, w = small.shape
        return path.read_bytes(), (d, h, w)


def _figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{escape(caption)}</figcaption></figure>"
