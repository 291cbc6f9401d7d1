"""The hash of a cohort: what changes it, and what must not."""

from __future__ import annotations

import numpy as np
import pytest

from dataset.manifest import manifest
from dataset.sources import NiftiSource, PhantomSource, StoreSource
from dataset.store import write_store
from dataset.volume_io import Volume, write_nifti


def test_it_knows_who_is_held_out_and_what_is_in_a_volume():
    a, b, c = (PhantomSource(seed, (8, 8, 8)) for seed in range(3))
    base = manifest({"training": [a, b], "validation": [c]})
    assert base == manifest({"validation": [c], "training": [b, a]})
    others = [
        {"training": [a, c], "validation": [b]},
        {"training": [a], "validation": [c]},
        {"training": [a, b, c], "validation": []},
        {"training": [a, PhantomSource(1, (8, 8, 9))], "validation": [c]},
    ]
    assert len({base, *map(manifest, others)}) == 5


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".b2nd"])
def test_it_survives_a_move_and_notices_another_content(tmp_path, suffix):
    def one(folder, value, shape=(4, 8, 8)):
        path = tmp_path / folder / f"a{suffix}"
        path.parent.mkdir()
        volume = Volume(np.full(shape, value, np.int16), np.diag([2.0, 2.0, 2.0, 1.0]))
        write_store(path, volume, {}) if suffix == ".b2nd" else write_nifti(path, volume)
        return manifest({"training": [(StoreSource if suffix == ".b2nd" else NiftiSource)(path)]})

    first = one("here", 3)
    assert one("there", 3) == first
    assert one("longer", 3, (5, 8, 8)) != first
    if suffix != ".nii":  # of which the size alone is known
        assert one("other", 4) != first


def test_a_file_that_cannot_be_read_is_for_the_preparation_to_name(tmp_path):
    path = tmp_path / "a.b2nd"
    gone = manifest({"training": [StoreSource(path)]})
    path.write_bytes(b"no store")
    damaged = manifest({"training": [StoreSource(path)]})
    write_store(path, Volume(np.zeros((4, 8, 8), np.int16), np.eye(4)), {})
    assert gone == damaged != manifest({"training": [StoreSource(path)]})
