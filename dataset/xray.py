"""Chest X-rays: any file to one standard tensor.

The tensor is float32 (1, size, size) in [0, 1]: upright, bones bright, the patient's left on the right (lateral: the
chest on the left), its aspect ratio kept by black padding, borders of collimation off and its histogram brought to the
standard one, so that radiographs of any make and radiographs rendered from CT can be mixed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from dataset.xray_decode import XRayView, decode_xray
from dataset.xray_drr import read_info
from dataset.xray_standard import Placement, content_box, fit_square, pad_square, standardise
from errors import ConfigurationError, InputError, one_line

MAX_SIZE = 4096


@dataclass(frozen=True)
class XRay:
    """A standard radiograph.

    Args:
        image: float32 (1, size, size) in [0, 1].
        view: as far as the file tells; PNG and JPEG tell nothing, pictures of render_drr.py do.
        pixel_spacing_mm: (row, column) of ``image`` on the detector, where the file tells; the patient is smaller by
            the magnification, about 10 %.
        source: the file.
        placement: which pixel of the upright file a pixel of ``image`` is.
        notes: what was done, for provenance.
    """

    image: torch.Tensor
    view: XRayView
    pixel_spacing_mm: tuple[float, float] | None
    source: str
    placement: Placement
    notes: tuple[str, ...]


def load_xray(path: str | os.PathLike[str], size: int = 256, *, view: XRayView = "unknown") -> XRay:
    """Read a PNG, JPEG or DICOM radiograph.

    Args:
        path: recognised by content, not by name.
        size: side of the tensor in pixels.
        view: the view that is needed; a file that says to be another is refused. With "unknown" any is taken.

    Raises:
        InputError: no sound radiograph, or of another view; the message names the file.
        ConfigurationError: a size that makes no picture.
    """
    if not 16 <= size <= MAX_SIZE:
        raise ConfigurationError(f"X-ray size {size}: give 16 to {MAX_SIZE} pixels")
    path = Path(path)
    decoded = decode_xray(path)
    found, spacing, notes = decoded.view, decoded.pixel_spacing_mm, list(decoded.notes)
    if decoded.kind == "png" and (info := read_info(path)) is not None:
        if info.geometry.shape != decoded.pixels.shape:
            raise InputError(f"{path}: its size does not fit the geometry beside it: render it again")
        found, spacing = info.geometry.view, info.geometry.pixel_spacing_mm
        notes.append("rendered from CT")
    if "unknown" not in (view, found) and view != found:
        raise InputError(f"{path}: a {found} radiograph, a {view} one is needed: give that one")
    try:
        box = content_box(decoded.pixels)
        content, placement = fit_square(decoded.pixels, size, box, 1.0 if spacing is None else spacing[0] / spacing[1])
        image = pad_square(standardise(content), size, placement)
    except InputError as error:
        raise InputError(one_line(f"{path}: {error}")) from error
    top, bottom, left, right = box
    if (bottom - top, right - left) != decoded.pixels.shape:
        notes.append(f"borders off: rows {top} to {bottom}, columns {left} to {right} kept")
    if spacing is not None:
        spacing = spacing[0] * placement.scale[0], spacing[1] * placement.scale[1]
    return XRay(torch.from_numpy(image)[None], found, spacing, str(path), placement, tuple(notes))


def view_of(path: str | os.PathLike[str]) -> XRayView:
    """Which view a radiograph is, as far as its file tells; no pixel is decoded.

    Raises:
        InputError: the file is gone, or its header contradicts itself; the message names it.
    """
    path = Path(path)
    try:
        with open(path, "rb") as handle:
            head = handle.read(132)
        if head[128:132] == b"DICM":
            from dataset.xray_dicom import dicom_view

            return dicom_view(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): copy it again") from error
    except InputError as error:
        raise InputError(one_line(f"{path}: {error}")) from error
    info = read_info(path)
    return "unknown" if info is None else info.geometry.view
