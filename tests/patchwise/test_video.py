"""Videos: every frame a plane of the volume, upright and on the right side, and a file that plays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from errors import InputError, StorageError
from evaluation.panels import panel_image
from evaluation.video import comparison_video, video_frames

SPACING = (2.0, 1.0, 1.0)
OPTIONS = {"window": (0.0, 2000.0), "tile_px": 96}


def ramp(shape: tuple[int, int, int] = (21, 40, 40)) -> np.ndarray:
    """HU that grow towards superior, posterior and left."""
    d, h, w = np.indices(shape)
    return (-900 + 30 * d + 8 * h + 8 * w).astype(np.int16)


def test_the_middle_frame_is_the_panel() -> None:
    """Orientation, colours and proportions are those of `panel_image`, which has tests of its own."""
    volume = ramp((21, 41, 41))
    changed = volume + 50
    frames = list(video_frames(volume, changed, SPACING, frames=3, **OPTIONS))
    assert np.array_equal(frames[1], panel_image(volume, changed, SPACING, **OPTIONS))
    first = panel_image(volume, changed, SPACING, position_dhw=(20, 0, 0), **OPTIONS)
    assert np.array_equal(frames[0], first)
    assert not np.array_equal(frames[0], frames[2])


def test_a_panel_outside_the_volume_is_refused() -> None:
    for position in ((21, 0, 0), (0, -1, 0), (0, 0)):
        with pytest.raises(InputError, match="position"):
            panel_image(ramp(), ramp(), SPACING, position_dhw=position, **OPTIONS)


def test_frames_sweep_from_neck_to_diaphragm_front_to_back_and_right_to_left() -> None:
    volume = ramp()
    frames = list(video_frames(volume, volume, SPACING, frames=5, **OPTIONS))
    assert len({frame.shape for frame in frames}) == 1
    greys = np.array([frame[:, : frame.shape[1] // 3].astype(int).mean(axis=2) for frame in frames])
    height = greys.shape[1]
    axial, sagittal = (
        greys[:, height // 6 : height // 5].mean((1, 2)),
        greys[:, -height // 4 : -height // 5].mean((1, 2)),
    )
    assert (np.diff(axial) < 0).all()  # superior is bright here and comes first
    assert (np.diff(sagittal) > 0).all()


def test_the_file_plays_and_the_error_is_seen(tmp_path: Path) -> None:
    volume = ramp()
    changed = volume.copy()
    changed[:, :20] += 300
    comparison_video(volume, changed, SPACING, tmp_path / "a.webp", frames=6, **OPTIONS)
    with Image.open(tmp_path / "a.webp") as video:
        assert (video.format, video.n_frames, video.info["loop"]) == ("WEBP", 6, 0)
        video.seek(3)
        frame = np.asarray(video.convert("RGB")).astype(int)
    right = frame[:, 2 * frame.shape[1] // 3 :]
    assert ((right[..., 0] - right[..., 2]) > 60).sum() > 100  # red: too dense
    assert list(tmp_path.iterdir()) == [tmp_path / "a.webp"]


@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        ((21, 40, 41), {}, "one grid"),
        ((21, 40, 40), {"frames": 0}, "0 frames"),
        ((21, 40, 40), {"window": (0.0, 0.0)}, "positive"),
    ],
)
def test_what_cannot_be_drawn(tmp_path: Path, shape, options, words: str) -> None:
    with pytest.raises(InputError, match=words):
        comparison_video(ramp(), ramp(shape), SPACING, tmp_path / "a.webp", **options)
    with pytest.raises(StorageError):
        comparison_video(ramp(), ramp(), SPACING, tmp_path / "none/a.webp", frames=1)
