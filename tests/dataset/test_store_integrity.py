"""A store's record is as well guarded as its voxels, and the environment does not decide what is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dataset.store import open_store, write_store
from dataset.volume_io import Volume
from errors import InputError

AFFINE = np.array([[0, 0, -0.75, 190.5], [0, -0.75, 0, 171.25], [1.25, 0, 0, -310.125], [0, 0, 0, 1]])


def volume() -> Volume:
    return Volume(np.random.default_rng(0).integers(-1000, 1000, (8, 12, 10)).astype(np.int16), AFFINE)


def test_a_flipped_bit_in_the_affine_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.b2nd"
    write_store(path, volume(), {})
    content = path.read_bytes()
    start = content.index(b'"affine"')
    for place in range(start, start + 80):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(InputError, match=r"a\.b2nd"):
                open_store(path)


def test_the_environment_does_not_change_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_store(tmp_path / "a.b2nd", volume(), {})
    monkeypatch.setenv("BLOSC_NTHREADS", "4")
    monkeypatch.setenv("BLOSC_CLEVEL", "9")
    write_store(tmp_path / "b.b2nd", volume(), {})
    assert (tmp_path / "a.b2nd").read_bytes() == (tmp_path / "b.b2nd").read_bytes()
