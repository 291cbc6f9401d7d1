"""Training samples: keyed randomness, patches that lie inside, air around small volumes, damage that is told."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.patch_sampling import BodyMap
from dataset.prepared import PreparedVolume
from dataset.store import write_store
from dataset.volume_dataset import VolumeDataset, collate
from dataset.volume_io import Volume
from errors import InputError
from params import HU_AIR

AFFINE = np.diag([2.0, 1.0, 1.0, 1.0])


def prepared(folder, name="a", shape=(6, 8, 10), offset=0):
    """Every voxel says where it is."""
    hu = (offset + np.arange(np.prod(shape)).reshape(shape)).astype(np.int16)
    path = folder / f"{name}.b2nd"
    write_store(path, Volume(hu, AFFINE), {})
    return PreparedVolume(name, path, AFFINE)


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("volumes"))


def test_whole_volumes(volume):
    sample = VolumeDataset([volume], None, random=True)[0]
    assert sample["hu"].dtype == torch.int16
    assert np.array_equal(sample["hu"][0], volume.open())
    assert np.array_equal(sample["affine"], AFFINE)
    assert sample["name"] == "a"
    assert sample["skipped"] == []


@settings(deadline=None, max_examples=60)
@given(st.tuples(st.integers(1, 6), st.integers(1, 8), st.integers(1, 10)), st.integers(0, 50), st.integers(0, 5))
def test_random_patches_lie_inside_and_their_affine_says_where(volume, patch, index, epoch):
    dataset = VolumeDataset([volume], patch, random=True, patches_per_volume=100)
    sample = dataset[epoch, index]
    hu = volume.open()
    start = sample["affine"][:3, 3] / np.diag(AFFINE)[:3]
    assert np.array_equal(start, start.astype(int))
    window = tuple(slice(int(a), int(a) + n) for a, n in zip(start, patch, strict=True))
    assert sample["hu"].shape == (1, *patch)
    assert np.array_equal(sample["hu"][0], np.asarray(hu)[window])


def test_a_sample_depends_on_seed_epoch_and_index_alone(volume):
    make = lambda seed=0: VolumeDataset([volume], (2, 2, 2), random=True, patches_per_volume=50, seed=seed)  # noqa: E731
    dataset = make()
    forward = [dataset[1, i]["hu"] for i in range(50)]
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    other = make()
    backward = [other[1, i]["hu"] for i in reversed(range(50))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert torch.equal(dataset[7]["hu"], dataset[0, 7]["hu"])
    corners = {int(patch[0, 0, 0, 0]) for patch in forward}
    assert len(corners) > 30
    for changed in ([dataset[2, i]["hu"] for i in range(50)], [make(seed=1)[1, i]["hu"] for i in range(50)]):
        assert sum(torch.equal(a, b) for a, b in zip(forward, changed, strict=True)) < 10


def test_a_few_patches_again_and_again(tmp_path):
    """``overfit_patches``: the first of epoch 0, in every epoch, whatever their volumes offer."""
    volumes = [prepared(tmp_path, name, offset=n) for n, name in enumerate("ab")]
    make = lambda few: VolumeDataset(  # noqa: E731
        volumes, (2, 2, 2), random=True, patches_per_volume=20, overfit_patches=few
    )
    free, fixed = make(None), make(3)
    assert len(fixed) == len(free) == 40
    for epoch in (0, 1, 7):
        for index in range(40):
            ours, theirs = fixed[epoch, index], free[0, index % 3]
            assert ours["name"] == theirs["name"]
            assert torch.equal(ours["hu"], theirs["hu"])
            assert np.array_equal(ours["affine"], theirs["affine"])
    assert not all(torch.equal(free[1, i]["hu"], free[0, i]["hu"]) for i in range(40))


def test_every_place_is_reached(volume):
    dataset = VolumeDataset([volume], (5, 7, 9), random=True, patches_per_volume=200)
    starts = {tuple(dataset[0, i]["affine"][:3, 3]) for i in range(200)}
    assert len(starts) == 8  # 2 × 2 × 2: both ends included


def test_validation_takes_the_centre(volume):
    dataset = VolumeDataset([volume], (2, 4, 4), random=False)
    assert np.array_equal(dataset[0]["hu"][0], volume.open()[2:4, 2:6, 3:7])
    assert torch.equal(dataset[5, 0]["hu"], dataset[0]["hu"])


@pytest.mark.parametrize("random", [True, False])
def test_short_axes_are_padded_with_air_on_both_sides(volume, random):
    sample = VolumeDataset([volume], (10, 8, 10), random=random)[0]
    hu = sample["hu"][0]
    assert np.array_equal(hu[2:8], volume.open())
    assert (hu[:2] == HU_AIR).all()
    assert (hu[8:] == HU_AIR).all()
    assert HU_AIR == -1000
    assert sample["affine"][0, 3] == -4.0  # 2 voxels of 2 mm in front


def test_length_and_order_of_patches(tmp_path):
    volumes = [prepared(tmp_path, name, offset=n) for n, name in enumerate("abc")]
    dataset = VolumeDataset(volumes, None, random=True, patches_per_volume=2)
    assert len(dataset) == 6
    assert [dataset[i]["name"] for i in range(6)] == list("abcabc")


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_volume_is_replaced_and_named(tmp_path, damage):
    volumes = [prepared(tmp_path, name) for name in "abc"]
    if damage == "cut":
        volumes[1].path.write_bytes(volumes[1].path.read_bytes()[:-1])
    else:
        volumes[1].path.unlink()
    dataset = VolumeDataset(volumes, (2, 2, 2), random=True)
    sample = dataset[0, 1]
    assert sample["name"] == "c"
    [(name, reason)] = sample["skipped"]
    assert name == "b"
    assert str(volumes[1].path) in reason
    assert dataset[0, 0]["skipped"] == []
    batch = collate([dataset[0, 0], sample])
    assert batch["skipped"] == sample["skipped"]
    assert batch["name"] == ["a", "c"]
    assert batch["hu"].shape == (2, 1, 2, 2, 2)
    assert batch["affine"].shape == (2, 4, 4)


def test_when_nothing_can_be_read(tmp_path):
    volumes = [prepared(tmp_path, name) for name in "ab"]
    for volume in volumes:
        volume.path.write_bytes(b"")
    with pytest.raises(InputError, match="none of 2 volumes"):
        VolumeDataset(volumes, None, random=False)[0]


def test_samples_own_their_memory(volume):
    sample = VolumeDataset([volume], None, random=False)[0]
    sample["hu"][:] = 7  # the file is mapped read-only
    assert int(volume.open()[0, 0, 1]) == 1


def test_patches_are_never_mirrored(volume):
    """The heart stays on the patient's left: voxels run along D, H and W as they do in the volume."""
    dataset = VolumeDataset([volume], (3, 4, 5), random=True, patches_per_volume=100, tissue_bias=0.5)
    for epoch in range(3):
        for index in range(30):
            sample = dataset[epoch, index]
            steps = [int(np.diff(sample["hu"][0], axis=axis).reshape(-1)[0]) for axis in range(3)]
            assert steps == [80, 10, 1]
            assert np.array_equal(sample["affine"][:3, :3], AFFINE[:3, :3])


def test_tissue_bias_takes_patches_from_the_body(tmp_path):
    volume = prepared(tmp_path, shape=(20, 20, 20))
    corner = BodyMap(np.array([[9, 9, 9]]), (2, 2, 2), (20, 20, 20))
    biased = PreparedVolume(volume.name, volume.path, AFFINE, corner)
    make = lambda v, bias: VolumeDataset([v], (4, 4, 4), random=True, patches_per_volume=200, tissue_bias=bias)  # noqa: E731
    starts = {tuple(make(biased, 1.0)[0, i]["affine"][:3, 3]) for i in range(20)}
    assert starts == {(32.0, 16.0, 16.0)}
    half = [tuple(make(biased, 0.5)[0, i]["affine"][:3, 3]) for i in range(200)]
    assert 70 < half.count((32.0, 16.0, 16.0)) < 130
    assert all(
        torch.equal(make(biased, 0.0)[0, i]["hu"], make(volume, 0.0)[0, i]["hu"]) for i in range(20)
    )  # runs without bias are what they were
