"""NIfTI in and out: HU and geometry survive to the bit, a write cut short leaves the old file (T28–T31)."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.geometry import Orientation, to_standard
from dataset.volume_io import Volume, floored, read_header, read_nifti, to_int16_hu, write_nifti
from errors import InputError, StorageError

from .test_geometry import ALL_CODES, affines, shapes
from .test_nifti_header import AFFINE, nifti_bytes, small_hu, stored

REAL_CT = Path(__file__).parents[2].parent / "shared" / "data" / "fixtures" / "cip_ct64.nii.gz"


@pytest.fixture(params=["ct.nii", "ct.nii.gz"])
def path(request, tmp_path):
    return tmp_path / request.param


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("codes", ALL_CODES[::5], ids="".join)
def test_t28_orientations_give_the_same_volume(codes, path):
    hu = small_hu()
    image = nib.Nifti1Image(hu, AFFINE)
    ornt = nib.orientations.ornt_transform(nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt(codes))
    nib.save(image.as_reoriented(ornt), path)
    volume = read_nifti(path)
    np.testing.assert_array_equal(volume.hu, hu.T)  # AFFINE is LPS
    assert volume.hu.dtype == np.int16
    np.testing.assert_allclose(volume.spacing_mm, (2.5, 0.7, 0.7), rtol=1e-6)
    assert volume.source == str(path)
    header = read_header(path)
    assert header.shape_dhw == volume.hu.shape
    assert header.spacing_mm == volume.spacing_mm
    np.testing.assert_array_equal(header.affine, volume.affine)

    write_nifti(path, volume)  # a result goes back onto the input's own grid
    again = nib.load(path)
    assert nib.aff2axcodes(again.affine) == codes
    np.testing.assert_array_equal(np.asanyarray(again.dataobj), np.asanyarray(image.as_reoriented(ornt).dataobj))
    np.testing.assert_allclose(again.affine, image.as_reoriented(ornt).affine, rtol=0, atol=1e-4)


def test_t28_we_simpleitk_and_nibabel_agree_on_all_48_orientations(tmp_path):
    """Three readers of one volume, stored in every way: the same voxels at the same places of the world."""
    import SimpleITK

    image, path = nib.Nifti1Image(small_hu(), AFFINE), tmp_path / "ct.nii"
    for codes in ALL_CODES:
        ornt = nib.orientations.ornt_transform(nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt(codes))
        nib.save(image.as_reoriented(ornt), path)
        ours = read_nifti(path)
        itk = SimpleITK.DICOMOrient(SimpleITK.ReadImage(str(path)), "LPS")
        np.testing.assert_array_equal(ours.hu, SimpleITK.GetArrayFromImage(itk))  # (z, y, x) of LPS
        loaded = nib.load(path)
        to_lps = nib.orientations.ornt_transform(
            nib.io_orientation(loaded.affine), nib.orientations.axcodes2ornt(("L", "P", "S"))
        )
        np.testing.assert_array_equal(ours.hu, np.asanyarray(loaded.as_reoriented(to_lps).dataobj).T)
        for index in np.ndindex(2, 2, 2):
            d, h, w = (int(i * (n - 1)) for i, n in zip(index, ours.hu.shape, strict=True))
            x, y, z = itk.TransformIndexToPhysicalPoint((w, h, d))  # LPS+
            np.testing.assert_allclose((ours.affine @ (d, h, w, 1))[:3], (-x, -y, z), atol=1e-3)


@pytest.mark.parametrize("dtype", ["<i2", ">i2", "u1", "i1", "<u2", ">i4", "<f4", ">f8"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_types_byte_orders_and_versions(path, dtype, kind):
    array = (np.arange(120).reshape(4, 5, 6)).astype(dtype)
    order = ">" if dtype.startswith(">") else "<"
    image = kind(array, AFFINE, kind.header_class(endianness=order))
    image.set_data_dtype(array.dtype)
    image.header.set_sform(AFFINE, 1)
    stored(path, image.to_bytes())
    np.testing.assert_array_equal(read_nifti(path).hu, array.T)


def test_slope_and_intercept_are_applied_once(path):
    raw = np.arange(120, dtype=np.int16).reshape(4, 5, 6)
    stored(path, nifti_bytes(raw, slope=2.0, intercept=-1024.0))
    np.testing.assert_array_equal(read_nifti(path).hu, raw.T * 2 - 1024)
    stored(path, nifti_bytes(raw, slope=0.0, intercept=77.0))  # NIfTI: slope 0 means not scaled
    np.testing.assert_array_equal(read_nifti(path).hu, raw.T)


def test_t30_reading_counts_what_it_rounds_and_clips(path):
    array = np.zeros((2, 2, 2), np.float32)
    array.flat[:6] = [1.5, 2.5, -0.6, 40000, -40000, 32767.4]
    stored(path, nifti_bytes(array))
    volume = read_nifti(path)
    assert volume.hu.transpose(2, 1, 0).ravel().tolist() == [2, 2, -1, 32767, -32768, 32767, 0, 0]
    assert (volume.rounded, volume.clipped) == (4, 2)
    stored(path, nifti_bytes(np.arange(120, dtype=np.int16).reshape(4, 5, 6), slope=0.5))
    assert (read_nifti(path).rounded, read_nifti(path).clipped) == (60, 0)


def test_four_dimensions_of_length_one_are_three(path):
    hu = small_hu()
    stored(path, nifti_bytes(hu[..., None]))
    np.testing.assert_array_equal(read_nifti(path).hu, hu.T)


def test_qform_serves_where_there_is_no_sform(path):
    image = nib.Nifti1Image(small_hu(), None)
    image.set_qform(AFFINE, 1)
    nib.save(image, path)
    np.testing.assert_allclose(read_nifti(path).affine[:3, 3], AFFINE[:3, 3], atol=1e-4)


def test_units_are_honoured(path):
    metres = AFFINE.copy()
    metres[:3] /= 1000
    stored(path, nifti_bytes(affine=metres, xyzt_units=1))
    np.testing.assert_allclose(read_nifti(path).spacing_mm, (2.5, 0.7, 0.7), rtol=1e-5)


def test_header_extensions_and_padding(path):
    image = nib.Nifti1Image(small_hu(), AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension(6, b"a comment" * 100))
    stored(path, image.to_bytes() + b"\0" * 100)
    np.testing.assert_array_equal(read_nifti(path).hu, small_hu().T)


# ---------------------------------------------------------------- writing


@given(shape=shapes, file_affine=affines(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_t29_round_trip_is_exact(tmp_path_factory, shape, file_affine, data):
    path = tmp_path_factory.getbasetemp() / f"round_trip.nii{data.draw(st.sampled_from(['', '.gz']))}"
    hu = np.random.default_rng(data.draw(st.integers(0, 99))).integers(-32768, 32768, shape).astype(np.int16)
    standard, affine = to_standard(hu, file_affine)
    report = write_nifti(path, Volume(standard, affine, orientation=Orientation.of(file_affine)))
    assert (report.rounded, report.clipped) == (0, 0)
    volume = read_nifti(path)
    np.testing.assert_array_equal(volume.hu, standard)
    np.testing.assert_array_equal(volume.affine, affine)
    assert volume.hu.dtype == np.int16
    image = nib.load(path)  # and others see the same
    np.testing.assert_array_equal(np.asanyarray(image.dataobj), hu)
    np.testing.assert_array_equal(image.affine, file_affine)


def test_the_header_that_is_written(path):
    hu = small_hu((3, 4, 5))
    affine = np.array([[0, 0, -0.7, 9], [0, -0.7, 0, 12], [2.5, 0, 0, -30], [0, 0, 0, 1.0]])
    write_nifti(path, Volume(hu, affine))
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    header = nib.Nifti1Header(raw[:348], check=True)
    assert len(raw) == 352 + hu.nbytes
    assert header.get_data_dtype() == np.int16
    assert (float(header["scl_slope"]), float(header["scl_inter"])) == (1.0, 0.0)
    assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 1)
    assert header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(header.get_sform(), header.get_qform(), atol=1e-5)
    np.testing.assert_allclose(header.get_zooms(), (0.7, 0.7, 2.5), rtol=1e-6)
    assert nib.aff2axcodes(header.get_sform()) == ("L", "P", "S")

    before = path.read_bytes()
    write_nifti(path, Volume(hu, affine))
    assert path.read_bytes() == before  # the same volume, the same bytes

    sheared = affine.copy()
    sheared[1, 0] = 0.8  # a gantry tilt
    write_nifti(path, Volume(hu, sheared))
    assert int(nib.load(path).header["qform_code"]) == 0
    np.testing.assert_allclose(read_nifti(path).affine, sheared, atol=1e-6)


def test_t30_writing_floats_counts_rounding_and_clipping(path):
    values = np.array([1.0, 1.5, -0.25, 1e6, -1e6, 40000.5, 0.0, 7.0], np.float32).reshape(2, 2, 2)
    report = write_nifti(path, Volume(values, np.diag([1.0, -1, -1, 1])[[2, 1, 0, 3]]))
    assert (report.rounded, report.clipped) == (3, 3)
    assert read_nifti(path).hu.ravel().tolist() == [1, 2, 0, 32767, -32768, 32767, 0, 7]


def test_t21_padding_below_the_floor_is_counted_and_the_rest_untouched():
    hu = np.array([-32768, -3024, -1025, -1024, -1023, 0, 32767], np.int16)
    result, count = floored(hu)
    assert result.tolist() == [-1024] * 4 + [-1023, 0, 32767]
    assert (result.dtype, count) == (np.int16, 3)
    assert hu[0] == -32768
    clean = hu[3:]
    assert floored(clean)[0] is clean


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64, np.float16, np.float64])
def test_to_int16_of_every_type(dtype):
    values = np.array([0, 1, 200, 32767, 40000, 65500][: 3 if dtype == np.uint8 else 6]).astype(dtype)
    hu, rounded, clipped = to_int16_hu(values)
    assert hu.dtype == np.int16
    assert hu.tolist() == np.clip(values.astype(np.int64), -32768, 32767).tolist()
    assert rounded == 0
    assert clipped == int((values.astype(np.float64) > 32767).sum())


@pytest.mark.parametrize(
    ("volume", "reason"),
    [
        (Volume(np.full((2, 2, 2), np.nan), np.eye(4)), "NaN"),
        (Volume(np.zeros((2, 2), np.int16), np.eye(4)), "three non-empty"),
        (Volume(np.zeros((2, 2, 2), np.int16), np.zeros((4, 4))), "affine"),
        (Volume(np.zeros((2, 2, 2), complex), np.eye(4)), "dtype"),
        (Volume(np.zeros((1, 1, 40000), np.int16), np.eye(4)), "NIfTI-1"),
    ],
)
def test_what_is_no_volume_is_not_written(path, volume, reason):
    path.write_bytes(b"old")
    with pytest.raises(InputError, match=reason) as caught:
        write_nifti(path, volume)
    assert str(caught.value).startswith(str(path))
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == [path.name]


WRITE = """
import os, resource, signal, sys
import numpy as np
from dataset import volume_io
from errors import run_command
if sys.argv[2] == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
calls = 0
def killing(plane, whole=volume_io.to_int16_hu):
    global calls
    calls += 1
    if calls == 40 and sys.argv[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(plane)
volume_io.to_int16_hu = killing
hu = np.random.default_rng(0).integers(-1000, 1000, (64, 100, 100)).astype(np.int16)
affine = np.diag([1.0, -1, -1, 1])[[2, 1, 0, 3]]
sys.exit(run_command(lambda: volume_io.write_nifti(sys.argv[1], volume_io.Volume(hu, affine)) and 0))
"""


@pytest.mark.parametrize(("way", "code"), [("kill", -9), ("full", 6)])
def test_t31_a_write_cut_short_leaves_the_old_file(path, way, code):
    path.write_bytes(b"old")
    done = subprocess.run(
        [sys.executable, "-c", WRITE, str(path), way], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code, done.stderr
    assert path.read_bytes() == b"old"
    if way == "full":
        assert done.stderr.strip().splitlines() == [done.stderr.strip()]
        assert str(path) in done.stderr
        assert os.listdir(path.parent) == [path.name]


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="choose another folder"):
        write_nifti(tmp_path / "file" / "ct.nii.gz", Volume(small_hu(), np.diag([1.0, -1, -1, 1])[[2, 1, 0, 3]]))


# ---------------------------------------------------------------- a real CT


@pytest.mark.skipif(not REAL_CT.exists(), reason="shared/data is not here: no real CT to read")
def test_real_ct(tmp_path):
    volume = read_nifti(REAL_CT)
    image = nib.as_closest_canonical(nib.load(REAL_CT))  # RAS+
    np.testing.assert_array_equal(volume.hu, np.asanyarray(image.dataobj)[::-1, ::-1].transpose(2, 1, 0))
    assert volume.hu.shape == (79, 64, 64)
    assert read_header(REAL_CT).shape_dhw == volume.hu.shape
    body = volume.hu > -300
    centre_w = np.argwhere(body & (volume.hu < 300))[:, 2].mean()
    assert abs(centre_w - 31.5) < 8
    # the spine is posterior: dense bone has a larger H than the rest of the body
    bone_h, body_h = (np.argwhere(mask)[:, 1].mean() for mask in (volume.hu > 300, body))
    assert bone_h > body_h
    write_nifti(tmp_path / "again.nii.gz", volume)
    again = read_nifti(tmp_path / "again.nii.gz")
    np.testing.assert_array_equal(again.hu, volume.hu)
    np.testing.assert_array_equal(again.affine, volume.affine)
