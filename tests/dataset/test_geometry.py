"""Orientation, crop and resampling: the same volume from all 48 orientations (T28), exact round trips (T29)."""

from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from dataset.geometry import (
    LPS_STORAGE,
    Orientation,
    affine_after_crop,
    checked_affine,
    crop_or_pad,
    from_standard,
    resample_to_size,
    resampled_affine,
    spacing_mm,
    to_standard,
)
from errors import InputError

ALL_CODES = [
    tuple(pair[side] for pair, side in zip(order, sides, strict=True))
    for order in permutations(("RL", "AP", "SI"))
    for sides in product((0, 1), repeat=3)
]


@st.composite
def affines(draw):
    """Any affine of a scanner: rotation, spacing, a little shear (gantry tilt), origin; float32 as NIfTI keeps it."""
    number = st.floats(-1, 1, allow_nan=False, width=32)
    rotation = Rotation.from_euler("xyz", [draw(number) * np.pi for _ in range(3)]).as_matrix()
    shear = np.eye(3)
    shear[1, 2] = draw(number) * 0.5
    spacing = [draw(st.floats(0.25, 8, width=32)) for _ in range(3)]
    affine = np.eye(4)
    affine[:3, :3] = rotation @ shear @ np.diag(spacing)
    affine[:3, 3] = [draw(number) * 500 for _ in range(3)]
    return affine.astype(np.float32).astype(np.float64)


shapes = st.tuples(*[st.integers(1, 6)] * 3)


def standard_volume():
    """A (D, H, W) volume whose voxels all differ, and an oblique affine that is nearest to S, P, L."""
    array = np.arange(3 * 4 * 5, dtype=np.int16).reshape(3, 4, 5)
    affine = np.array([[0.1, 0.05, -0.7, 90], [0.2, -0.7, -0.05, 120], [2.5, 0.1, 0.1, -300], [0, 0, 0, 1.0]])
    return array, affine


def test_codes_cover_all_orientations():
    assert len(set(ALL_CODES)) == 48


@pytest.mark.parametrize("codes", ALL_CODES, ids="".join)
def test_every_orientation_gives_the_same_volume(codes):
    array, affine = standard_volume()
    # nibabel stores the volume in the given orientation: an implementation that is not ours
    image = nib.Nifti1Image(array, affine)
    transform = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(codes)
    )
    stored = image.as_reoriented(transform)
    assert nib.aff2axcodes(stored.affine) == codes

    file_array = np.asanyarray(stored.dataobj)
    standard, standard_affine = to_standard(file_array, stored.affine)
    np.testing.assert_array_equal(standard, array)
    np.testing.assert_allclose(standard_affine, affine, rtol=0, atol=1e-12)

    orientation = Orientation.of(stored.affine)
    assert orientation.codes == codes
    back, back_affine = from_standard(standard, standard_affine, orientation)
    np.testing.assert_array_equal(back, file_array)
    np.testing.assert_array_equal(back_affine, stored.affine)
    without_file, computed = from_standard(standard, standard_affine, Orientation(codes))
    np.testing.assert_array_equal(without_file, file_array)
    np.testing.assert_allclose(computed, stored.affine, rtol=0, atol=1e-12)


def test_standard_axes_run_as_promised():
    # RAS storage: x, y, z grow with i, j, k; the voxel farthest left, posterior and superior is the standard's last
    file_array = np.arange(24).reshape(2, 3, 4)
    standard, affine = to_standard(file_array, np.diag([1.0, 2, 3, 1]))
    assert standard.shape == (4, 3, 2)
    assert standard[-1, -1, -1] == file_array[0, 0, -1]
    assert spacing_mm(affine) == (3.0, 2.0, 1.0)
    np.testing.assert_array_equal(affine[:3, :3], [[0, 0, -1], [0, -2, 0], [3, 0, 0]])


def test_lps_storage_is_the_standard_array_in_fortran_order():
    array, affine = standard_volume()
    file_array, file_affine = from_standard(array, affine)
    assert nib.aff2axcodes(file_affine) == LPS_STORAGE.codes
    np.testing.assert_array_equal(file_array.T, array)
    assert file_array.T.flags.c_contiguous  # a view: nothing is copied


@given(shape=shapes, affine=affines())
@settings(max_examples=200, deadline=None)
def test_round_trip_is_exact_and_no_voxel_moves(shape, affine):
    file_array = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    standard, standard_affine = to_standard(file_array, affine)
    back, back_affine = from_standard(standard, standard_affine, Orientation.of(affine))
    np.testing.assert_array_equal(back, file_array)
    np.testing.assert_array_equal(back_affine, affine)
    np.testing.assert_allclose(sorted(spacing_mm(standard_affine)), sorted(spacing_mm(affine)), rtol=1e-12)
    for voxel in (0, file_array.size // 2, file_array.size - 1):
        before = affine @ [*np.argwhere(file_array == voxel)[0], 1]
        after = standard_affine @ [*np.argwhere(standard == voxel)[0], 1]
        np.testing.assert_allclose(after, before, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a[:3],
        lambda a: np.where(np.eye(4, dtype=bool), np.nan, a),
        lambda a: np.where(np.eye(4, dtype=bool), np.inf, a),
        lambda a: a * [[1], [1], [0], [1]],
        lambda a: a[:, [0, 0, 2, 3]],
        lambda a: a * [0, 1, 1, 1],
        lambda a: np.where(np.eye(4) < 0.5, 1, a),
    ],
    ids=["3x4", "nan", "inf", "flat", "parallel", "no length", "last row"],
)
def test_unusable_affines_are_refused(change):
    affine = change(np.diag([1.0, 2, 3, 1]))
    with pytest.raises(InputError, match="affine"):
        checked_affine(affine)
    with pytest.raises(InputError, match="affine"):
        to_standard(np.zeros((2, 2, 2)), affine)


def test_unusable_arrays_and_codes_are_refused():
    with pytest.raises(InputError, match="three non-empty axes"):
        to_standard(np.zeros((2, 2)), np.eye(4))
    with pytest.raises(InputError, match="three non-empty axes"):
        from_standard(np.zeros((2, 0, 2)), np.eye(4))
    with pytest.raises(InputError, match="axis codes"):
        Orientation(("L", "R", "S"))


@given(shape=shapes, size=shapes, affine=affines())
@settings(max_examples=100, deadline=None)
def test_crop_or_pad_moves_no_voxel(shape, size, affine):
    array = np.arange(1, np.prod(shape) + 1, dtype=np.int16).reshape(shape)
    result, result_affine = crop_or_pad(array, affine, size, fill=-1000)
    assert result.shape == size
    assert result.dtype == array.dtype
    kept = np.argwhere(result > 0)
    assert len(kept) == np.prod(np.minimum(shape, size))  # the centre fills all that fits, the rest is air
    assert (result[result <= 0] == -1000).all()
    for index in kept[[0, -1]]:
        before = affine @ [*np.argwhere(array == result[tuple(index)])[0], 1]
        np.testing.assert_allclose(result_affine @ [*index, 1], before, rtol=0, atol=1e-9)
    # centred to within half a voxel
    shift = np.linalg.solve(affine, result_affine)[:3, 3] + (np.array(size) - 1) / 2 - (np.array(shape) - 1) / 2
    assert np.abs(shift).max() <= 0.5 + 1e-6


def test_crop_or_pad_at_a_given_start():
    array = np.arange(10, dtype=np.int16).reshape(1, 1, 10)
    result, affine = crop_or_pad(array, np.eye(4), (1, 1, 4), (0, 0, 8))
    assert result.ravel().tolist() == [8, 9, -1000, -1000]
    np.testing.assert_array_equal(affine, affine_after_crop(np.eye(4), (0, 0, 8)))
    assert affine[2, 3] == 8
    assert crop_or_pad(array, np.eye(4), (1, 1, 3), (0, 0, -5))[0].ravel().tolist() == [-1000] * 3
    with pytest.raises(InputError, match="size"):
        crop_or_pad(array, np.eye(4), (1, 0, 4))


def test_resampling_keeps_the_field_of_view():
    affine = np.array([[0, 0.1, -0.7, 90], [0, -0.7, -0.1, 120], [2.5, 0, 0, -300], [0, 0, 0, 1.0]])
    old, new = (30, 20, 24), (12, 40, 7)
    resampled = resampled_affine(affine, old, new)
    for corner in product((0, 1), repeat=3):
        edge_old = affine @ [*(np.array(corner) * old - 0.5), 1]
        edge_new = resampled @ [*(np.array(corner) * new - 0.5), 1]
        np.testing.assert_allclose(edge_new, edge_old, rtol=0, atol=1e-10)


@pytest.mark.parametrize("size", [(30, 20, 24), (12, 40, 7), (1, 1, 1), (64, 3, 24)])
def test_resampling_constants_and_ramps(size):
    shape = (30, 20, 24)
    constant, _ = resample_to_size(np.full(shape, -1000, np.int16), np.eye(4), size)
    assert constant.shape == size
    assert constant.dtype == np.float32
    np.testing.assert_array_equal(constant, -1000)

    # a linear field is reproduced at the world position of every voxel away from the edges
    field = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), axis=-1) @ [3.0, -2, 5]
    result, affine = resample_to_size(field, np.eye(4), size)
    index = np.stack(np.meshgrid(*[np.arange(n) for n in size], indexing="ij"), axis=-1)
    expected = (index * np.diag(affine)[:3] + affine[:3, 3]) @ [3.0, -2, 5]
    inner = tuple(slice(n // 4, n - n // 4) for n in size)
    np.testing.assert_allclose(result[inner], expected[inner], rtol=0, atol=0.6 if min(size) > 1 else 2)


def test_resampling_agrees_with_skimage_and_does_not_alias():
    transform = pytest.importorskip("skimage.transform")
    volume = np.random.default_rng(0).normal(0, 100, (24, 32, 40))
    ours, _ = resample_to_size(volume, np.eye(4), (8, 16, 20))
    theirs = transform.resize(volume, (8, 16, 20), order=1, anti_aliasing=True, mode="edge")
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)
    stripes = np.broadcast_to(1000.0 * (-1) ** np.arange(64), (2, 2, 64))
    aliased = resample_to_size(stripes, np.eye(4), (2, 2, 21))[0]
    assert np.abs(aliased).max() < 150  # stripes finer than the new grid become grey
