"""Cohorts and the cache of prepared volumes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from dataset.pairs_case import CTCase
from dataset.sources import (
    NiftiSource,
    PhantomSource,
    StoreSource,
    default_cache,
    find_nifti,
    find_stores,
    prepare,
    prepare_all,
)
from dataset.store import verify_store, write_store
from dataset.volume_io import Volume, write_nifti
from errors import ConfigurationError, InputError, StorageError

AFFINE = np.array([[0, 0, -1.0, 10], [0, -1.0, 0, 20], [2.0, 0, 0, -30], [0, 0, 0, 1]])


def nifti(path: Path, seed=0, shape=(6, 8, 10)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    hu = np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)
    write_nifti(path, Volume(hu, AFFINE))
    return path


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def test_native_grid_is_kept_to_the_bit(tmp_path, cache):
    source = NiftiSource(nifti(tmp_path / "a.nii.gz"))
    prepared = prepare(source, None, cache)
    volume = source.load()
    opened = prepared.open()
    assert opened.dtype == np.int16
    assert np.array_equal(opened, volume.hu)
    assert np.array_equal(prepared.affine, volume.affine)
    assert prepared.name == "a"


def test_resampled_whole_and_in_place(tmp_path, cache):
    source = NiftiSource(nifti(tmp_path / "a.nii.gz"))
    prepared = prepare(source, (3, 4, 5), cache)
    assert prepared.open().shape == (3, 4, 5)
    centre = prepared.affine @ [1, 1.5, 2, 1]
    np.testing.assert_allclose(centre, source.load().affine @ [2.5, 3.5, 4.5, 1])


@pytest.mark.parametrize("size", [None, (3, 4, 5)])
def test_t21_padding_is_floored_before_it_is_resampled(tmp_path, cache, size):
    hu = np.random.default_rng(0).integers(-1024, 1000, (6, 8, 10)).astype(np.int16)
    prepared = []
    for name, padding in (("padded", -3024), ("clean", -1024)):
        hu[:, :2] = padding
        write_nifti(tmp_path / f"{name}.nii.gz", Volume(hu, AFFINE))
        prepared.append(prepare(NiftiSource(tmp_path / f"{name}.nii.gz"), size, cache))
    np.testing.assert_array_equal(prepared[0].open(), prepared[1].open())
    counts = [verify_store(volume.path).metadata["padded_voxels"] for volume in prepared]
    assert counts == [6 * 2 * 10, 0]


def test_cache_is_reused(tmp_path, cache, monkeypatch):
    source = NiftiSource(nifti(tmp_path / "a.nii.gz"))
    first = prepare(source, None, cache)
    monkeypatch.setattr(NiftiSource, "load", lambda self: pytest.fail("read again"))
    again = prepare(source, None, cache)
    assert again.path == first.path
    assert np.array_equal(again.affine, first.affine)


def test_other_sizes_and_other_content_have_other_keys(tmp_path, cache):
    path = nifti(tmp_path / "a.nii.gz")
    source = NiftiSource(path)
    paths = {prepare(source, size, cache).path for size in (None, (6, 8, 10), (3, 4, 5))}
    assert len(paths) == 3
    before = np.asarray(prepare(source, None, cache).open())
    nifti(path, seed=1)
    os.utime(path, ns=(1, 1))
    after = prepare(source, None, cache)
    assert after.path not in paths
    assert not np.array_equal(after.open(), before)
    assert len(list(cache.glob("*.b2nd"))) == 4
    # the same name in another folder is another volume
    other = NiftiSource(nifti(tmp_path / "b" / "a.nii.gz", seed=2))
    assert prepare(other, None, cache).path not in paths | {after.path}


def test_phantoms_are_reproducible(cache):
    a, b = PhantomSource(3, (8, 16, 16)), PhantomSource(4, (8, 16, 16))
    assert (a.name, a.patient) == ("phantom_00003", "phantom_00003")
    assert np.array_equal(prepare(a, (8, 16, 16), cache).open(), a.load().hu)
    assert not np.array_equal(a.load().hu, b.load().hu)
    assert PhantomSource(3, (8, 16, 32)).identity != a.identity


def test_a_file_that_cannot_be_read_does_not_stop_the_rest(tmp_path, cache):
    for name in ("a", "c"):
        nifti(tmp_path / f"{name}.nii.gz")
    (tmp_path / "b.nii.gz").write_bytes(b"this is no NIfTI")
    sources = find_nifti(str(tmp_path))
    prepared, failed = prepare_all(sources, None, cache, "test volumes")
    assert [volume.name for volume in prepared] == ["a", "c"]
    assert list(failed) == ["b"]
    assert "b.nii.gz" in failed["b"]
    assert not list(cache.glob("b-*"))


@pytest.mark.parametrize("damage", ["cut", "empty", "noise"])
def test_a_damaged_cache_file_is_named(tmp_path, cache, damage):
    prepared = prepare(NiftiSource(nifti(tmp_path / "a.nii.gz")), None, cache)
    content = prepared.path.read_bytes()
    prepared.path.write_bytes({"cut": content[:-10], "empty": b"", "noise": os.urandom(500)}[damage])
    with pytest.raises(InputError) as caught:
        prepared.open()
    assert str(prepared.path) in str(caught.value)
    assert "the next run makes it again" in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "flipped"])
def test_a_damaged_cached_volume_is_made_again(tmp_path, cache, damage, caplog):
    """A flipped bit as well, which opening does not see: what changed since it was verified is read to its end."""
    source = NiftiSource(nifti(tmp_path / "a.nii.gz", shape=(20, 30, 40)))
    for _ in range(2):  # the second time it is verified and remembered
        [prepared], _ = prepare_all([source], None, cache, "test volumes")
    content = prepared.path.read_bytes()
    assert not caplog.records
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    changed = {"cut": content[:-10], "empty": b"", "noise": os.urandom(500), "flipped": bytes(flipped)}[damage]
    prepared.path.write_bytes(changed)
    [again], failed = prepare_all([source], None, cache, "test volumes")
    assert failed == {}
    assert again.path.read_bytes() == content
    assert np.array_equal(again.open(), source.load().hu)
    [record] = caplog.records
    assert str(prepared.path) in record.message
    assert "made again" in record.message


def test_verified_volumes_are_not_read_again(tmp_path, cache, monkeypatch):
    source = NiftiSource(nifti(tmp_path / "a.nii.gz"))
    for _ in range(2):
        prepare_all([source], None, cache, "test volumes")
    monkeypatch.setattr("dataset.store.verify_store", lambda path: pytest.fail("read again"))
    assert len(prepare_all([source], None, cache, "test volumes")[0]) == 1


def stored(path: Path, metadata=None, seed=0) -> Path:
    hu = np.random.default_rng(seed).integers(-1000, 1000, (6, 8, 10)).astype(np.int16)
    write_store(path, Volume(hu, AFFINE), metadata or {})
    return path


def test_a_store_is_read_where_it_lies(tmp_path, cache):
    source = StoreSource(stored(tmp_path / "a.b2nd"))
    before = source.path.read_bytes()
    for size in (None, (6, 8, 10)):
        prepared = prepare(source, size, cache)
        assert prepared.path == source.path
        assert np.array_equal(prepared.affine, AFFINE)
        assert prepared.body is not None
    assert not list(cache.glob("*.b2nd"))
    assert source.path.read_bytes() == before
    resampled = prepare(source, (3, 4, 5), cache)
    assert resampled.path.parent == cache
    assert resampled.open().shape == (3, 4, 5)


def test_the_body_is_found_once_where_the_writer_left_it_out(tmp_path, cache, monkeypatch):
    source = StoreSource(stored(tmp_path / "a.b2nd"))
    first = prepare(source, None, cache).body
    monkeypatch.setattr("dataset.prepared.body_metadata", lambda *volume: pytest.fail("computed again"))
    assert np.array_equal(prepare(source, None, cache).body.cells, first.cells)
    box = {"body": {"bounding_box_vox": [[1, 1, 1], [3, 4, 5]]}}
    ours = prepare(StoreSource(stored(tmp_path / "b.b2nd", box)), None, cache).body
    assert ours.offset_vox == (1, 1, 1)


def test_a_damaged_store_of_the_user_is_told_and_left_alone(tmp_path, cache):
    path = stored(tmp_path / "a.b2nd")
    stored(tmp_path / "b.b2nd", seed=1)
    content = path.read_bytes()[:-1]
    path.write_bytes(content)
    prepared, failed = prepare_all(find_stores(str(tmp_path)), None, cache, "test volumes")
    assert [volume.name for volume in prepared] == ["b"]
    assert str(path) in failed["a"]
    assert path.read_bytes() == content


def test_loading_a_store_verifies_it(tmp_path):
    path = stored(tmp_path / "a.b2nd")
    assert np.array_equal(StoreSource(path).load().hu, verify_store(path).hu)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=str(path)):
        StoreSource(path).load()


def test_find_stores(tmp_path):
    with pytest.raises(ConfigurationError, match=r"dataset\.root_dir"):
        find_stores(None)
    with pytest.raises(InputError, match="build_store"):
        find_stores(str(tmp_path))
    for name in ("b.b2nd", ".c.b2nd", "a.b2nd"):
        stored(tmp_path / name)
    assert [(source.name, source.patient) for source in find_stores(str(tmp_path))] == [("a", "a"), ("b", "b")]


def test_a_cache_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"dataset\.cache_dir"):
        prepare(NiftiSource(nifti(tmp_path / "a.nii.gz")), None, tmp_path / "file" / "cache")


def test_find_nifti(tmp_path):
    for name in ("b.nii.gz", "sub/a.nii", "sub/deeper/c.nii.gz"):
        nifti(tmp_path / name)
    (tmp_path / "notes.txt").write_text("")
    assert {source.name for source in find_nifti(str(tmp_path))} == {"a", "b", "c"}
    assert [s.path for s in find_nifti(str(tmp_path))] == sorted(s.path for s in find_nifti(str(tmp_path)))


@pytest.mark.parametrize("root", [None, "", "/no/such/folder"])
def test_find_nifti_needs_a_folder(root):
    with pytest.raises(ConfigurationError, match=r"dataset\.root_dir"):
        find_nifti(root)


def test_find_nifti_refuses_empty_folders_and_twins(tmp_path):
    with pytest.raises(InputError, match="holds no"):
        find_nifti(str(tmp_path))
    nifti(tmp_path / "a.nii.gz")
    nifti(tmp_path / "sub" / "a.nii")
    with pytest.raises(InputError, match="several files are called a"):
        find_nifti(str(tmp_path))


def test_default_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "xray2ctpa"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "xray2ctpa"


def test_a_damaged_store_is_left_to_the_preparation(tmp_path, cache):
    """It names no patient, but nothing of it is ever read."""
    stored(tmp_path / "a.b2nd")
    stored(tmp_path / "b.b2nd", seed=1).write_bytes(b"damaged")
    sources = find_stores(str(tmp_path))
    assert [source.patient for source in sources] == ["a", "b"]
    assert list(prepare_all(sources, None, cache, "volumes")[1]) == ["b"]


def test_a_volume_without_air_is_prepared_with_a_warning_that_names_it(tmp_path, cache, caplog):
    tissue = Volume(np.full((6, 8, 10), 40, np.int16), AFFINE)
    write_nifti(tmp_path / "crop.nii", tissue)
    write_store(tmp_path / "crop.b2nd", tissue, {})
    for source in (NiftiSource(tmp_path / "crop.nii"), StoreSource(tmp_path / "crop.b2nd")):
        for _ in range(2):  # made, then found in the cache
            caplog.clear()
            [prepared], failed = prepare_all([source], None, cache, "volumes")
            assert not failed
            [record] = caplog.records
            assert record.levelname == "WARNING"
            assert str(source.path) in record.message or str(prepared.path) in record.message
            assert "below -300 HU" in record.message


def test_a_case_on_a_store_is_read_where_it_lies(tmp_path, cache):
    write_store(tmp_path / "s.b2nd", NiftiSource(nifti(tmp_path / "a.nii")).load(), {})
    prepared = prepare(CTCase("case", "p", tmp_path / "s.b2nd"), None, cache)
    assert (prepared.name, prepared.path) == ("case", tmp_path / "s.b2nd")
    assert not list(cache.glob("*.b2nd"))


def test_damaged_stores_of_the_user_are_found_before_training(tmp_path, cache):
    (tmp_path / "stores").mkdir()
    for name in ("a", "b"):
        stored(tmp_path / "stores" / f"{name}.b2nd", {})
    content = bytearray((tmp_path / "stores" / "b.b2nd").read_bytes())
    content[len(content) // 3] ^= 4  # within the voxels, which opening does not read
    (tmp_path / "stores" / "b.b2nd").write_bytes(content)
    sources = find_stores(str(tmp_path / "stores"))
    for _ in range(2):
        prepared, failed = prepare_all(sources, None, cache, "volumes")
        assert [volume.name for volume in prepared] == ["a"]
        assert list(failed) == ["b"]
        assert "not those that were written" in failed["b"]
    assert (tmp_path / "stores" / "b.b2nd").exists(), "the user's files are never removed"
