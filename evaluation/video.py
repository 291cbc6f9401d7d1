"""Animated WebP of a reconstruction beside its original: three planes sweep through the volume, with the error in HU.

The same picture as `evaluation.panels` (radiological display, true proportions), frame by frame. WebP through Pillow:
browsers play it, nothing besides Pillow is needed, and a pixel takes a fraction of what GIF takes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from dataset.atomic import atomic_write
from errors import InputError
from evaluation import panels
from params import MEDIASTINUM_WINDOW


def comparison_video(
    original_hu: np.ndarray,
    reconstruction_hu: np.ndarray,
    spacing_dhw_mm: Sequence[float],
    path: str | os.PathLike[str],
    *,
    window: tuple[float, float] = MEDIASTINUM_WINDOW,
    error_range_hu: float = 300.0,
    frames: int = 48,
    frame_ms: int = 100,
    tile_px: int = 224,
) -> None:
    """Write `video_frames` to ``path`` as an endless animated WebP, atomically; arguments and errors as there.

    Args:
        original_hu: see `video_frames`.
        reconstruction_hu: see `video_frames`.
        spacing_dhw_mm: see `video_frames`.
        path: the .webp to make or replace.
        window: see `video_frames`.
        error_range_hu: see `video_frames`.
        frames: see `video_frames`.
        frame_ms: how long a frame is shown.
        tile_px: see `video_frames`.

    Raises:
        StorageError: the disk refuses.
    """
    stills = video_frames(
        original_hu,
        reconstruction_hu,
        spacing_dhw_mm,
        window=window,
        error_range_hu=error_range_hu,
        frames=frames,
        tile_px=tile_px,
    )
    images = (Image.fromarray(still) for still in stills)
    first = next(images)
    with atomic_write(path) as handle:
        options = {"save_all": True, "append_images": images, "duration": frame_ms, "loop": 0}
        first.save(handle, format="WEBP", quality=75, method=2, **options)


def video_frames(
    original_hu: np.ndarray,
    reconstruction_hu: np.ndarray,
    spacing_dhw_mm: Sequence[float],
    *,
    window: tuple[float, float] = MEDIASTINUM_WINDOW,
    error_range_hu: float = 300.0,
    frames: int = 48,
    tile_px: int = 224,
) -> Iterator[np.ndarray]:
    """Frames of the sweep: axial from superior to inferior, coronal from anterior, sagittal from the right.

    Args:
        original_hu: (D, H, W) on the standard axes, any real dtype, HU; planes are read one at a time.
        reconstruction_hu: the same shape; NaN is drawn as magenta.
        spacing_dhw_mm: voxel spacing.
        window: display window (level, width) in HU.
        error_range_hu: the error's colours saturate at ± this, in all frames.
        frames: how many; the first and the last plane of each axis are among them.
        tile_px: pixels of the volume's longest side.

    Yields:
        uint8 (height, width, 3) RGB, all of one size.

    Raises:
        InputError: shapes differ, are not 3D, or the spacing, a range or the number of frames is not positive.
    """
    shape = original_hu.shape
    if shape != reconstruction_hu.shape or len(shape) != 3 or 0 in shape:
        raise InputError(
            f"original {shape} and reconstruction {reconstruction_hu.shape}: two volumes on one grid needed"
        )
    if len(spacing_dhw_mm) != 3 or not all(0 < mm < math.inf for mm in spacing_dhw_mm):
        raise InputError(f"spacing {list(spacing_dhw_mm)} mm: three positive numbers are needed")
    if not (window[1] > 0 and error_range_hu > 0 and frames > 0):
        raise InputError(
            f"window width {window[1]}, error range {error_range_hu} HU and {frames} frames must be positive"
        )
    extent_mm = [count * mm for count, mm in zip(shape, spacing_dhw_mm, strict=True)]
    px_per_mm = tile_px / max(extent_mm)
    headings = [f"original  (L {window[0]:g} W {window[1]:g} HU)", "reconstruction", "reconstruction - original"]
    for number in range(frames):
        progress = number / (frames - 1) if frames > 1 else 0.5
        rows = []
        for name, axis, turn_up, letters in panels._PLANES:
            # slice 0 is the most inferior: an axial sweep starts at the neck, as readers scroll
            place = round((1 - progress if axis == 0 else progress) * (shape[axis] - 1))
            planes = [_plane(volume, axis, place, turn_up) for volume in (original_hu, reconstruction_hu)]
            height_mm, width_mm = (mm for other, mm in enumerate(extent_mm) if other != axis)
            size = tuple(max(round(mm * px_per_mm), panels._MIN_TILE_PX) for mm in (width_mm, height_mm))
            error_hu = panels._resize(planes[1] - planes[0], (size[0], size[1]))
            tiles = [panels._grey(panels._resize(plane, (size[0], size[1])), window) for plane in planes]
            tiles.append(panels._signed_colours(error_hu, error_range_hu))
            marks, captions = (letters, letters, ""), (f"{name} {place}", "", "")
            rows.append([panels._annotate(*drawn) for drawn in zip(tiles, marks, captions, strict=True)])
        yield panels._compose(rows, headings, error_range_hu)


def _plane(volume_hu: np.ndarray, axis: int, place: int, turn_up: bool) -> np.ndarray:
    """float32 (rows, columns) as displayed: D grows towards superior but image rows grow downwards."""
    plane = np.asarray(volume_hu[tuple(place if a == axis else slice(None) for a in range(3))]).astype(np.float32)
    return plane[::-1] if turn_up else plane
