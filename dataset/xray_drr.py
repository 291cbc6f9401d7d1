"""The files of a rendered radiograph: a 16-bit PNG of line integrals, and the geometry as JSON beside it.

Counts are line integrals times a fixed number, the same for all patients: nothing is stretched per picture, so a count
goes back to a share of the beam, exp(-count / counts_per_unit), and pictures can be compared.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dataset.atomic import atomic_write
from dataset.geometry import checked_affine
from dataset.projection import ConeGeometry
from errors import InputError, one_line

# Line integrals up to 16.4: 850 mm of water, or half a metre with the spine lengthwise.
COUNTS_PER_UNIT = 4000.0
FORMAT = "x-ray2ctpa drr 1"
_MAX_SIDECAR_BYTES = 1 << 20


@dataclass(frozen=True)
class DRRInfo:
    """What is known of a rendered radiograph.

    Args:
        geometry: source and detector in RAS+ mm.
        affine: (4, 4) of the volume it was rendered from, (d, h, w, 1) -> RAS+ mm.
        shape_dhw: size of that volume.
        details: the whole JSON object.
    """

    geometry: ConeGeometry
    affine: np.ndarray
    shape_dhw: tuple[int, int, int]
    details: dict[str, Any]


def sidecar_of(picture: Path) -> Path:
    """Where the geometry of a picture lies."""
    return picture.with_suffix(".json")


def write_drr(
    picture: Path,
    line_integrals: np.ndarray,
    geometry: ConeGeometry,
    affine: np.ndarray,
    shape_dhw: tuple[int, int, int],
    details: dict[str, Any],
) -> int:
    """Write PNG and JSON, each atomically, the same bytes for the same input.

    Args:
        picture: the .png; its folder must exist.
        line_integrals: float (rows, columns), -log of the transmitted share.
        geometry: of this picture.
        affine: (4, 4) of the volume.
        shape_dhw: of the volume.
        details: further JSON-able facts.

    Returns:
        The number of pixels beyond the range, which were clipped.

    Raises:
        StorageError: the disk refuses.
    """
    counts = np.rint(line_integrals.astype(np.float64) * COUNTS_PER_UNIT)
    clipped = int(np.count_nonzero((counts < 0) | (counts > 65535)))
    encoded = io.BytesIO()
    Image.fromarray(np.clip(counts, 0, 65535).astype(np.uint16)).save(encoded, format="PNG")
    record = {
        **details,
        "format": FORMAT,
        "counts_per_unit": COUNTS_PER_UNIT,
        "clipped_pixels": clipped,
        "geometry": geometry.as_dict(),
        "volume": {"shape_dhw": list(shape_dhw), "affine_ras_mm": affine.tolist()},
    }
    with atomic_write(picture) as handle:
        handle.write(encoded.getvalue())
    with atomic_write(sidecar_of(picture)) as handle:
        handle.write((json.dumps(record, indent=2, sort_keys=True) + "\n").encode())
    return clipped


def read_info(picture: Path) -> DRRInfo | None:
    """The geometry of a rendered radiograph; None for a picture that has none, such as a real radiograph.

    Raises:
        InputError: there is one, and it is damaged.
    """
    path = sidecar_of(picture)
    try:
        with open(path, "rb") as handle:
            text = handle.read(_MAX_SIDECAR_BYTES + 1)
        details = json.loads(text) if len(text) <= _MAX_SIDECAR_BYTES else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: cannot be read ({one_line(error)}): render the picture again or remove it"
        ) from error
    if not isinstance(details, dict) or details.get("format") != FORMAT:
        return None  # somebody else's JSON
    try:
        geometry = ConeGeometry.from_dict(details["geometry"])
        affine = checked_affine(np.array(details["volume"]["affine_ras_mm"], dtype=np.float64))
        depth, height, width = (int(length) for length in details["volume"]["shape_dhw"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"{path}: damaged ({type(error).__name__}: {one_line(error)}): render the picture again"
        ) from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return DRRInfo(geometry, affine, (depth, height, width), details)


def read_line_integrals(picture: Path) -> tuple[np.ndarray, DRRInfo]:
    """Line integrals float32 (rows, columns) and the geometry of a rendered radiograph.

    Raises:
        InputError: it is not one, or damaged.
    """
    info = read_info(picture)
    if info is None:
        raise InputError(f"{picture}: no {sidecar_of(picture).name} beside it: give a picture of render_drr.py")
    try:
        with Image.open(picture, formats=("PNG",)) as image:
            if image.size != info.geometry.shape[::-1] or not image.mode.startswith("I"):
                raise InputError(f"{picture}: {image.mode} {image.size} does not fit its geometry: render it again")
            counts = np.asarray(image, dtype=np.float32)
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{picture}: cannot be read ({one_line(error)}): render it again") from error
    return counts / np.float32(COUNTS_PER_UNIT), info
