"""The native-grid store: exact, deterministic, atomic, small; test_store_damage.py has what is not sound."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from pathlib import Path

import blosc2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.geometry import spacing_mm
from dataset.store import open_store, verify_store, write_store
from dataset.store_frame import MAX_RECORD_BYTES
from dataset.volume_io import Volume, read_nifti
from errors import InputError, StorageError
from tests.dataset.store_factory import AFFINE, METADATA, noise, store
from tests.helpers import REAL_DATA

__all__ = ["store"]


def test_round_trip_is_exact(store: Path) -> None:
    stored = open_store(store)
    assert stored.shape == stored.hu.shape == (40, 50, 70)
    assert stored.hu.dtype == np.int16
    assert np.array_equal(np.asarray(stored.hu), noise())
    assert np.array_equal(stored.affine, AFFINE)
    assert stored.affine.dtype == np.float64
    assert stored.spacing_mm == spacing_mm(AFFINE)
    assert stored.metadata == METADATA
    assert verify_store(store).checksum == stored.checksum


def test_it_is_a_plain_b2nd_file(store: Path) -> None:
    assert np.array_equal(blosc2.open(str(store), mode="r")[3:5, 1:9], noise()[3:5, 1:9])


def index_of(length: int) -> st.SearchStrategy[slice | int]:
    bound = st.none() | st.integers(-length - 2, length + 2)
    return st.builds(slice, bound, bound, st.sampled_from([None, 1, 2, 7])) | st.integers(-length, length - 1)


@settings(deadline=None, max_examples=40)
@given(index_of(40), index_of(50), index_of(70))
def test_slices_are_those_of_numpy(store: Path, d: slice | int, h: slice | int, w: slice | int) -> None:
    stored, expected = open_store(store), noise()
    for key in ((d, h, w), (d, h), d, (..., w)):
        assert np.array_equal(stored.hu[key], expected[key])


@settings(deadline=None, max_examples=25)
@given(st.tuples(st.integers(1, 70), st.integers(1, 140), st.integers(1, 140)), st.integers(0, 9))
def test_any_shape(tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, int, int], seed: int) -> None:
    path = tmp_path_factory.getbasetemp() / "shape.b2nd"
    hu = noise(shape, seed)
    write_store(path, Volume(hu, AFFINE), {})
    assert np.array_equal(verify_store(path).hu[...], hu)


def test_the_same_volume_gives_the_same_bytes(tmp_path: Path) -> None:
    volume = Volume(noise((70, 130, 140)), AFFINE)
    flipped = Volume(np.ascontiguousarray(volume.hu[:, ::-1])[:, ::-1], AFFINE)  # the same voxels, other strides
    for number, one in enumerate([volume, volume, flipped]):
        write_store(tmp_path / f"{number}.b2nd", one, dict(reversed(METADATA.items())) if number else METADATA)
    assert len({(tmp_path / f"{number}.b2nd").read_bytes() for number in range(3)}) == 1


def test_out_of_range_reads_raise_as_numpy_does(store: Path) -> None:
    with pytest.raises(IndexError):
        open_store(store).hu[40]


def read_in_child(stored: object, queue: multiprocessing.Queue) -> None:
    queue.put(int(stored.hu[5, 6, 7]))  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_handles_are_opened_by_the_process_that_reads(store: Path, method: str) -> None:
    stored = open_store(store)
    assert stored.hu[5, 6, 7] == noise()[5, 6, 7]  # the parent's handle is open
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=read_in_child, args=(stored, queue))
    process.start()
    assert queue.get(timeout=60) == noise()[5, 6, 7]
    process.join()


def test_pickles_as_its_path(store: Path) -> None:
    stored = open_store(store)
    stored.hu[0]
    again = pickle.loads(pickle.dumps(stored))
    assert len(pickle.dumps(stored)) < 3000
    assert np.array_equal(again.hu[1], noise()[1])


def test_volumes_that_cannot_be_stored(tmp_path: Path) -> None:
    path = tmp_path / "a.b2nd"
    for hu, affine, metadata in [
        (noise((0, 4, 4)), AFFINE, {}),
        (noise((4, 4)), AFFINE, {}),
        (np.full((2, 2, 2), np.nan), AFFINE, {}),
        (noise((2, 2, 2)), np.zeros((4, 4)), {}),
        (noise((2, 2, 2)), AFFINE, {"note": "x" * MAX_RECORD_BYTES}),
    ]:
        with pytest.raises(InputError):
            write_store(path, Volume(hu, affine), metadata)
    assert not list(tmp_path.iterdir())
    with pytest.raises(StorageError, match="does not exist"):
        write_store(tmp_path / "no" / "a.b2nd", Volume(noise((2, 2, 2)), AFFINE), {})


def write_and_die(path: Path) -> None:
    os.replace = lambda *names: os._exit(9)  # type: ignore[assignment]
    write_store(path, Volume(noise(seed=1), AFFINE), {})


def test_t31_a_kill_during_a_write_leaves_the_old_store(tmp_path: Path) -> None:
    path = tmp_path / "a.b2nd"
    write_store(path, Volume(noise(), AFFINE), METADATA)
    before = path.read_bytes()
    process = multiprocessing.get_context("fork").Process(target=write_and_die, args=(path,))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    assert path.read_bytes() == before
    verify_store(path)


@pytest.mark.parametrize("name", ["lidc_0001", pytest.param("lidc_0002", marks=pytest.mark.slow)])
def test_real_ct_takes_less_than_045_of_raw(tmp_path: Path, name: str) -> None:
    source = REAL_DATA / "ct_native" / f"{name}.nii.gz"
    if not source.exists():
        pytest.skip("shared/data is not here")
    volume = read_nifti(source)
    path = tmp_path / "a.b2nd"
    write_store(path, volume, {})
    assert path.stat().st_size < 0.45 * volume.hu.nbytes
    assert np.array_equal(open_store(path).hu[20:60, 100:300, 200:400], volume.hu[20:60, 100:300, 200:400])
