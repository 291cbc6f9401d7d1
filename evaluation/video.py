"""Animated WebP of a reconstruction beside its original: three planes sweep through the volume, with the error in HU.

Every frame is a picture of `evaluation.panels` (radiological display, true proportions). WebP through Pillow:
browsers play it, nothing besides Pillow is needed, and a pixel takes a fraction of what GIF takes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from dataset.atomic import atomic_write
from errors import InputError
from evaluation.panels import panel_image
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
    if frames < 1:
        raise InputError(f"{frames} frames: the number must be positive")
    for number in range(frames):
        progress = number / (frames - 1) if frames > 1 else 0.5
        # slice 0 is the most inferior: an axial sweep starts at the neck, as readers scroll
        shares = (1 - progress, progress, progress)
        position = [round(share * (count - 1)) for share, count in zip(shares, original_hu.shape, strict=True)]
        yield panel_image(
            original_hu,
            reconstruction_hu,
            spacing_dhw_mm,
            window=window,
            error_range_hu=error_range_hu,
            tile_px=tile_px,
            position_dhw=position,
        )
