"""A DICOM radiograph -> its pixels as the viewing station shows them, upright, bones bright.

The grey pipeline is the standard's (PS3.3 C.7.6.3, C.11.1, C.11.2): modality LUT, VOI LUT or window, and the inversion
that MONOCHROME1 asks for, which pydicom leaves to its caller. Rows and columns are turned by PatientOrientation.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dataset.xray_decode import Decoded, XRayView, check_size
from errors import InputError

log = logging.getLogger(__name__)

_MODALITIES = {"CR", "DX", "RG", "RF", "OT", "SC", ""}
_DEFLATED = "1.2.840.10008.1.2.1.99"
_RLE = "1.2.840.10008.1.2.5"
FRONTAL = frozenset({"PA", "AP", "AP SUPINE", "AP ERECT", "PA ERECT"})  # of ViewPosition, as the next two
# anterior, posterior and lateral obliques: the heart is another shape on them than on either view
_OBLIQUE = {"LAO", "RAO", "LPO", "RPO", "LLO", "RLO", "OBL", "OBLIQUE"}
_LATERAL = {"LL", "RL", "LAT", "LATERAL", "LLAT", "RLAT", "L LAT", "R LAT"}
# Towards where the columns (to the right) and rows (down) of an upright picture run.
_UPRIGHT = {"frontal": ("L", "F"), "lateral": ("P", "F")}
_OPPOSITE = {"L": "R", "R": "L", "A": "P", "P": "A", "H": "F", "F": "H"}
_DECODER_PACKAGES = "pylibjpeg, pylibjpeg-libjpeg and pylibjpeg-openjpeg"


def decode_dicom(path: Path) -> Decoded:
    """Read one DICOM radiograph.

    Raises:
        InputError: damaged, no radiograph, oblique, several frames, or a transfer syntax that cannot be decoded.
    """
    import pydicom
    from pydicom.filereader import read_file_meta_info

    # pydicom tells each oddity of a header as a warning, with the value, which may name the patient; damaged files it
    # reports by any exception at all, whose text is not passed on for the same reason
    with warnings.catch_warnings(), _quiet(logging.getLogger("pydicom")):
        warnings.simplefilter("ignore")
        try:
            if read_file_meta_info(path).get("TransferSyntaxUID") == _DEFLATED:
                # it would be inflated whole before its size could be checked
                raise InputError("deflated DICOM is not read: store it uncompressed (dcmconv +te)")
            header = pydicom.dcmread(path)
            return _decode(header)
        except (InputError, MemoryError, OSError):
            raise
        except Exception as error:
            raise InputError(f"damaged DICOM ({type(error).__name__}): export it again") from error


def dicom_view(path: Path) -> XRayView:
    """The view that a DICOM header names; nothing is decoded.

    Raises:
        InputError: damaged, oblique, or its view position and its patient orientation disagree.
    """
    import pydicom

    with warnings.catch_warnings(), _quiet(logging.getLogger("pydicom")):
        warnings.simplefilter("ignore")
        try:
            return _named_view(pydicom.dcmread(path, stop_before_pixels=True))[0]
        except (InputError, MemoryError):
            raise
        except Exception as error:
            raise InputError(f"damaged DICOM ({type(error).__name__}): export it again") from error


def _decode(header: Any) -> Decoded:
    modality = str(header.get("Modality", "")).strip().upper()
    if modality not in _MODALITIES:
        raise InputError(f"modality {modality}, not a radiograph (CR, DX): give a chest X-ray")
    if "PixelData" not in header:
        raise InputError("holds no pixels: export it again")
    if int(header.get("NumberOfFrames", 1) or 1) != 1:
        raise InputError(f"holds {header.NumberOfFrames} frames: give a single radiograph")
    rows, columns = int(header.Rows), int(header.Columns)
    check_size(columns, rows)
    _check_codestream(header, rows, columns)
    notes = [f"dicom {header.PhotometricInterpretation}"]
    pixels = _displayed(header, _pixels(header, rows, columns), notes)
    view, turned, notes_of_view = _upright(header, pixels)
    spacing, origin = _spacing(header)
    if origin:
        notes.append(origin)
    if spacing is not None and turned:
        spacing = spacing[::-1]
    return Decoded(np.ascontiguousarray(view[1], dtype=np.float32), "dicom", view[0], spacing, (*notes, *notes_of_view))


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


def _pixels(header: Any, rows: int, columns: int) -> np.ndarray:
    syntax = header.file_meta.TransferSyntaxUID
    if syntax == _RLE:
        # pydicom reads it by itself; a decoder in Rust, where one is installed, panics on damage
        header.pixel_array_options(decoding_plugin="pydicom")
    try:
        pixels = header.pixel_array
    except (MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a decoder in Rust panics past Exception
        if isinstance(error, RuntimeError) and "missing" in str(error):
            raise InputError(f"{syntax.name} needs a decoder: pip install {_DECODER_PACKAGES}") from error
        raise InputError(
            f"pixels in {syntax.name} cannot be decoded ({type(error).__name__}): export it again"
        ) from error
    photometric = header.PhotometricInterpretation
    if photometric == "PALETTE COLOR":
        from pydicom.pixels.processing import apply_color_lut

        pixels = apply_color_lut(pixels, header)
    if pixels.ndim == 3:  # pydicom has converted YBR to RGB
        pixels = pixels[..., :3] @ np.array([0.299, 0.587, 0.114])
    if pixels.shape != (rows, columns):
        raise InputError(f"pixels {pixels.shape} do not fit {rows} rows and {columns} columns: export it again")
    return pixels


def _displayed(header: Any, pixels: np.ndarray, notes: list[str]) -> np.ndarray:
    """Stored values -> display values float32: modality LUT, VOI LUT or window, and MONOCHROME1 inverted."""
    from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut

    if header.PhotometricInterpretation in ("MONOCHROME1", "MONOCHROME2"):
        pixels = apply_modality_lut(pixels, header)
        if "VOILUTSequence" in header:
            pixels = apply_voi_lut(pixels, header)
            notes.append("VOI LUT")
        elif "WindowCenter" in header and "WindowWidth" in header:
            centre, width = (float(np.atleast_1d(header[name].value)[0]) for name in ("WindowCenter", "WindowWidth"))
            seen = float(np.mean(np.abs(pixels[::8, ::8] - centre) < width / 2))
            if width >= 1 and np.isfinite([centre, width]).all() and seen > 0:
                pixels = apply_voi_lut(pixels, header)
                notes.append(f"window {centre:g} {width:g}")
            else:
                # common in files that were edited by hand; the pixels themselves are sound
                log.warning("%s: window %g %g shows nothing and is ignored", header.filename, centre, width)
                notes.append(f"unusable window {centre:g} {width:g} ignored")
    values = pixels.astype(np.float32)
    if not np.isfinite(values).all():
        raise InputError("its LUT or rescale gives NaN or infinite values: export it again")
    if header.PhotometricInterpretation == "MONOCHROME1":
        values = values.max() - values
        notes.append("MONOCHROME1 inverted")
    return values


def _named_view(header: Any) -> tuple[XRayView, list[str]]:
    """The view, and towards where columns and rows run; [] where the header does not say and the stored way is meant.

    Raises:
        InputError: an oblique view, or view position and patient orientation disagree.
    """
    position = str(header.get("ViewPosition", "") or "").strip().upper()
    if position in _OBLIQUE:
        raise InputError(f"an oblique radiograph ({position}): give a frontal or a lateral one")
    named: XRayView = "frontal" if position in FRONTAL else "lateral" if position in _LATERAL else "unknown"
    orientation = header.get("PatientOrientation") or []
    # composed directions such as "LF" are led by the main one
    letters = [str(direction).strip().upper()[:1] for direction in orientation] if len(orientation) == 2 else []
    if len(letters) != 2 or any(letter not in _OPPOSITE for letter in letters):
        return named, []
    seen: XRayView = "unknown"
    if not {"H", "F"}.isdisjoint(letters):
        other = next((letter for letter in letters if letter not in "HF"), "")
        seen = "frontal" if other in ("L", "R") else "lateral" if other else "unknown"
    if seen == "unknown" or (named != "unknown" and named != seen):
        raise InputError(
            f"view position {position or 'absent'} and patient orientation {letters} disagree: correct them"
        )
    return seen, letters


def _upright(header: Any, pixels: np.ndarray) -> tuple[tuple[XRayView, np.ndarray], bool, list[str]]:
    """Turn the picture so that the head is up and the patient's left (lateral: the back) is on the right."""
    view, letters = _named_view(header)
    position = str(header.get("ViewPosition", "") or "").strip().upper()
    notes = [f"view position {position}"] if position else []
    if not letters:
        return (view, pixels), False, notes
    transposed = letters[0] in "HF"
    if transposed:
        pixels, letters = pixels.T, letters[::-1]
    right, down = _UPRIGHT[view]
    if letters[0] != right:
        pixels = pixels[:, ::-1]
    if letters[1] != down:
        pixels = pixels[::-1]
    if transposed or letters != [right, down]:
        notes.append("turned as its patient orientation says")
    return (view, pixels), transposed, notes


def _spacing(header: Any) -> tuple[tuple[float, float] | None, str]:
    """(row, column) spacing in mm on the detector: the imager's, else the nominal one; zeros tell nothing."""
    for name in ("ImagerPixelSpacing", "PixelSpacing"):
        values = header.get(name)
        if values is not None and len(values) == 2:
            row, column = (float(value) for value in values)
            if 0 < row < 100 and 0 < column < 100:
                return (row, column), name
    return None, ""


def _check_codestream(header: Any, rows: int, columns: int) -> None:
    """Refuse a compressed picture whose own header names another size: decoders believe it and allocate."""
    if not header.file_meta.TransferSyntaxUID.is_encapsulated:
        return
    from pydicom.encaps import generate_frames

    frame = next(generate_frames(header.PixelData, number_of_frames=1))
    size = codestream_size(frame)
    if size is not None and size != (rows, columns):
        raise InputError(f"compressed picture of {size[0]} rows and {size[1]} columns, {rows} and {columns} announced")


def codestream_size(frame: bytes) -> tuple[int, int] | None:
    """(rows, columns) that a JPEG, JPEG-LS or JPEG 2000 codestream announces; None for others."""
    start = frame.find(b"\xff\x4f\xff\x51")
    if 0 <= start <= 4096 and len(frame) >= start + 24:
        x1, y1, x0, y0 = (int.from_bytes(frame[start + at : start + at + 4], "big") for at in (8, 12, 16, 20))
        return y1 - y0, x1 - x0
    if frame[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 <= len(frame) and frame[at] == 0xFF:
        marker = frame[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return int.from_bytes(frame[at + 5 : at + 7], "big"), int.from_bytes(frame[at + 7 : at + 9], "big")
        else:
            at += 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
    return None
