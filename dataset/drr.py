"""Radiographs on demand: rendered from a CT, once, into a cache."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dataset.body import Body, isolate_body
from dataset.drr_render import Stand, fit_geometry, render
from dataset.prepared import PreparedVolume, one_maker, short_hash
from dataset.projection import View
from dataset.store import open_store
from dataset.xray_drr import read_info, write_drr
from errors import InputError
from params import MU_WATER_PER_MM

# Part of every cache key: raise it when the same volume and stand give another picture.
RENDERER_VERSION = 1


def write_picture(
    picture: Path, body: Body, affine: np.ndarray, stand: Stand, view: View, source: str
) -> dict[str, Any]:
    """Render one radiograph of a patient into a 16-bit PNG with its geometry as JSON beside it.

    Args:
        picture: the .png; its folder must exist.
        body: the patient without the couch.
        affine: (4, 4) of the volume.
        stand: how far away source and detector stand, and the pixels.
        view: which picture.
        source: name of the volume, for the JSON.

    Returns:
        ``shape``, ``magnification``, ``greatest_line_integral`` and ``clipped_pixels`` of the picture.

    Raises:
        InputError: the volume is too flat for a projection.
        StorageError: the disk refuses.
    """
    geometry, isocentre = fit_geometry(body, affine, stand, view)
    line_integrals = render(body, affine, geometry)
    details = {
        "source": source,
        "isocentre_mm": isocentre.tolist(),
        "magnification_at_isocentre": geometry.magnification(isocentre),
        "pixel_spacing_mm": list(geometry.pixel_spacing_mm),
        "mu_water_per_mm": MU_WATER_PER_MM,
        "body_box_vox": [list(corner) for corner in body.bounding_box_vox],
        "voxels_set_to_air": body.removed_voxels,
    }
    clipped = write_drr(picture, line_integrals, geometry, affine, body.hu.shape, details)
    return {
        "shape": list(geometry.shape),
        "magnification": round(geometry.magnification(isocentre), 4),
        "greatest_line_integral": round(float(np.max(line_integrals)), 3),
        "clipped_pixels": clipped,
    }


def rendered_xray(volume: PreparedVolume, view: View, cache: Path, columns: int = 256) -> Path:
    """The radiograph of a prepared volume, rendered on first use.

    The picture's name depends on the voxels, the affine, the view and the stand; a second call finds it by reading the
    store's header and the picture's JSON. Of several processes that ask for it at a time, one renders it.

    Args:
        volume: as `dataset.sources.prepare` made it.
        view: "frontal" or "lateral".
        cache: folder of the pictures.
        columns: pixels across the detector of 430 mm.

    Returns:
        The 16-bit PNG (`dataset.xray_drr`), its geometry beside it; `dataset.xray.load_xray` reads it.

    Raises:
        InputError: the volume is damaged or shows nothing that can be projected; the message names its file.
        StorageError: the cache cannot be written.
    """
    stand = Stand(columns=columns)
    affine = np.asarray(volume.affine, dtype=np.float64)
    key = f"{RENDERER_VERSION} {open_store(volume.path).checksum} {affine.tobytes().hex()} {view} {asdict(stand)}"
    picture = cache / f"{volume.name}-{short_hash(key)}_{view}.png"
    with one_maker(picture):
        # the JSON is written last: where it is sound, the picture is complete
        with contextlib.suppress(InputError):
            if picture.is_file() and read_info(picture) is not None:
                return picture
        try:
            body = isolate_body(np.asarray(volume.open()), affine)
            write_picture(picture, body, affine, stand, view, volume.name)
        except InputError as error:
            if str(volume.path) in str(error):
                raise
            raise InputError(f"{volume.path}: {error}") from error
    return picture
