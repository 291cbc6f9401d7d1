"""A radiograph file of any kind -> its pixels as numbers, upright, bones bright.

PNG and JPEG are read here by Pillow, DICOM in `dataset.xray_dicom`. Files are recognised by content. What a file claims
about its size is checked before anything is decoded, so that a bomb costs nothing.
"""

from __future__ import annotations

import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageChops, ImageOps

from errors import InputError, MemoryExhaustedError, ProjectError, one_line

XRayView = Literal["frontal", "lateral", "unknown"]

# A 43×43 cm detector of 0.1 mm has 18 million pixels.
MAX_PIXELS = 25_000_000
# Smaller pictures are icons: no chest can be recognised.
MIN_SIDE = 32
_MAX_FILE_BYTES = 256 << 20


@dataclass(frozen=True)
class Decoded:
    """A radiograph as its file has it.

    Args:
        pixels: float32 (H, W), upright, bones bright; the unit is the file's own.
        kind: "png", "jpeg" or "dicom".
        view: as far as the file tells.
        pixel_spacing_mm: (row, column) on the detector, where the file tells.
        notes: what was done on the way, for provenance.
    """

    pixels: np.ndarray
    kind: str
    view: XRayView = "unknown"
    pixel_spacing_mm: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()


def decode_xray(path: str | os.PathLike[str]) -> Decoded:
    """Read a radiograph: PNG or JPEG of any mode, or DICOM.

    Raises:
        InputError: missing, another kind of file, damaged, too large, too small or constant; the message names it.
        MemoryExhaustedError: it is sound and does not fit into memory.
    """
    path = Path(path)
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise InputError("not a file: give one PNG, JPEG or DICOM")
        if status.st_size == 0:
            raise InputError("the file is empty: copy it again")
        if status.st_size > _MAX_FILE_BYTES:
            raise InputError(f"{status.st_size >> 20} MiB is too large for one radiograph: give one PNG, JPEG or DICOM")
        with open(path, "rb") as handle:
            head = handle.read(132)
        if head[128:132] == b"DICM":
            from dataset.xray_dicom import decode_dicom  # pydicom, which PNG cohorts need not load

            decoded = decode_dicom(path)
        elif head.startswith((b"\x89PNG", b"\xff\xd8\xff")):
            decoded = _decode_picture(path)
        else:
            raise InputError("neither PNG, JPEG nor DICOM: convert it to one of them")
        _require_content(decoded.pixels)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or one_line(error)}): copy it again") from error
    except MemoryError as error:
        raise MemoryExhaustedError(f"{path}: does not fit into memory: use a larger machine") from error
    except ProjectError as error:
        raise type(error)(one_line(f"{path}: {error}")) from error
    return decoded


def check_size(columns: int, rows: int) -> None:
    """Refuse what cannot be a radiograph before it is decoded.

    Raises:
        InputError: too small or too large.
    """
    if min(rows, columns) < MIN_SIDE:
        raise InputError(f"{columns}×{rows} pixels: at least {MIN_SIDE} on each side are needed")
    if rows * columns > MAX_PIXELS:
        raise InputError(
            f"{columns}×{rows} pixels: at most {MAX_PIXELS // 1_000_000} million are read, make it smaller"
        )


def _decode_picture(path: Path) -> Decoded:
    try:
        with warnings.catch_warnings():
            # our own limit is stricter than the one Pillow warns of
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=("PNG", "JPEG"))
        with image:
            check_size(*image.size)
            kind = "png" if image.format == "PNG" else "jpeg"
            image.load()
            upright = ImageOps.exif_transpose(image)
            notes = [f"{kind} {image.mode}"]
            if upright.size != image.size or image.getexif().get(0x0112, 1) != 1:
                notes.append("turned as its EXIF says")
            return Decoded(_grey(upright), kind, notes=tuple(notes))
    except Image.DecompressionBombError as error:
        raise InputError("too many pixels for a radiograph: make it smaller") from error
    except (SyntaxError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, EOFError) as error:
        # what Pillow's parsers let through on damaged chunks and EXIF
        raise InputError(
            f"damaged picture ({type(error).__name__}: {one_line(error)}): copy or export it again"
        ) from error
    except OSError as error:
        raise InputError(f"damaged picture ({one_line(error)}): copy or export it again") from error


def _grey(image: Image.Image) -> np.ndarray:
    """Grey values float32 (H, W) of any mode; transparency is laid over black, colours are weighed as in ITU-R 601."""
    # Pillow's own conversion of these to "L" clips at 255, which made 99.6 % of a 16-bit radiograph white
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        pixels = np.asarray(image, dtype=np.float32)
        if not np.isfinite(pixels).all():
            raise InputError("NaN or infinite pixels: export it again")
        return pixels
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    alpha = image.getchannel("A") if "A" in image.getbands() else None
    if image.mode not in ("1", "L", "LA", "RGB", "RGBA"):
        image = image.convert("RGBA" if alpha is not None else "RGB")
    grey = image.convert("L")
    if alpha is not None:
        grey = ImageChops.multiply(grey, alpha)
    return np.asarray(grey, dtype=np.float32)


def _require_content(pixels: np.ndarray) -> None:
    # one hot pixel in a constant picture is no picture either
    low, high = np.percentile(pixels[:: max(1, pixels.shape[0] // 512), :: max(1, pixels.shape[1] // 512)], (1, 99))
    if not high > low:
        raise InputError("the picture is constant: export it again")
