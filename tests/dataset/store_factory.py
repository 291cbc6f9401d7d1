"""A store of noise, and its volume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dataset.store import write_store
from dataset.volume_io import Volume

# index (d, h, w, 1) -> RAS+ mm, LPS, with digits that float32 does not hold
AFFINE = np.array([[0, 0, -0.7031251, 180.1], [0, -0.7031251, 0, 171.3], [1.25, 0, 0, -322.7], [0, 0, 0, 1.0]])
METADATA = {"kernel": "B30f", "body": {"bounding_box_vox": [[0, 1, 2], [3, 4, 5]]}, "spacing": 0.1}


def noise(shape: tuple[int, ...] = (40, 50, 70), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1024, 3071, shape).astype(np.int16)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "a.b2nd"
    write_store(path, Volume(noise(), AFFINE), METADATA)
    return path
