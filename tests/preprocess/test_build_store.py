"""preprocess/build_store.py: the voxels, places and facts of a file in its store."""

from __future__ import annotations

import json
import math
from argparse import ArgumentTypeError
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.body import body_metadata
from dataset.geometry import resample_to_size
from dataset.patch_sampling import read_body
from dataset.store import open_store
from dataset.verification import verify_files
from dataset.volume_io import NO_GEOMETRY, read_nifti, to_int16_hu, write_nifti
from errors import InputError
from preprocess.build_store import grid_name, parse_grid
from tests.dataset.test_geometry import ALL_CODES, affines, shapes
from tests.dataset.test_verification import volume
from tests.helpers import REAL_DATA, assert_one_line_error
from tests.preprocess.store_builds import build, contents, one, phantoms, source

__all__ = ["phantoms", "source"]


def test_native_grid_end_to_end(source, tmp_path):
    result = build(source, tmp_path / "out")
    assert "3 of 3 volumes stored" in result.stdout
    assert result.stderr == ""
    for name in ("a.nii.gz", "b.nii", "deep/a.nii.gz"):
        stored = open_store(tmp_path / "out" / (name.removesuffix(".gz").removesuffix(".nii") + ".b2nd"))
        original = read_nifti(source / name)
        np.testing.assert_array_equal(stored.hu[...], original.hu)
        np.testing.assert_array_equal(stored.affine, original.affine)
        assert stored.metadata["source"]["name"] == Path(name).name
        assert stored.metadata["grid"] == "native"
        assert stored.metadata["body"] == body_metadata(original.hu, original.affine)
        where = read_body(stored.metadata, stored.hu.shape)  # what the patch sampler draws from
        assert where is not None
        assert 0 < len(where.cells) * math.prod(where.cell_vox) < 0.9 * original.hu.size
    report = json.loads((tmp_path / "out" / "build_store.json").read_text())
    assert list(report["records"]) == ["a", "b", "deep/a"]
    assert report["records"]["deep/a"]["outputs"][0]["path"] == "deep/a.b2nd"


def test_resampled_grid_keeps_the_whole_field_of_view(source, tmp_path):
    build(source, tmp_path / "out", "--grid", "24x16x10")
    stored, original = open_store(tmp_path / "out" / "a.b2nd"), read_nifti(source / "a.nii.gz")
    assert stored.hu.shape == (10, 16, 24)
    expected, affine = resample_to_size(original.hu, original.affine, (10, 16, 24))
    np.testing.assert_array_equal(stored.hu[...], to_int16_hu(expected)[0])
    np.testing.assert_array_equal(stored.affine, affine)
    # outer corners of both grids are the same points of the world
    for corner in np.ndindex(2, 2, 2):
        points = [
            volume_affine @ [*(np.array(corner) * shape - 0.5), 1]
            for volume_affine, shape in ((stored.affine, (10, 16, 24)), (original.affine, original.hu.shape))
        ]
        np.testing.assert_allclose(points[0], points[1], atol=1e-9)


def test_t28_all_48_orientations_give_the_same_store(tmp_path):
    reference = volume(shape=(5, 6, 7))
    image = nib.Nifti1Image(reference.hu.T, reference.affine[:, [2, 1, 0, 3]])
    own = nib.io_orientation(image.affine)
    assert len(set(ALL_CODES)) == 48
    checksums = set()
    for codes in ALL_CODES:
        turned = image.as_reoriented(nib.orientations.ornt_transform(own, nib.orientations.axcodes2ornt(codes)))
        nib.save(turned, tmp_path / "ct.nii")
        checksums.add(one(tmp_path / "ct.nii", tmp_path / f"{''.join(codes)}.b2nd")["checksum"])
        stored = open_store(tmp_path / f"{''.join(codes)}.b2nd")
        np.testing.assert_array_equal(stored.hu[...], reference.hu)
        np.testing.assert_allclose(stored.affine, reference.affine, atol=1e-4)
    assert len(checksums) == 1


@given(shape=shapes, file_affine=affines(), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_t29_round_trip_is_exact(tmp_path_factory, shape, file_affine, seed):
    folder = tmp_path_factory.getbasetemp()
    hu = np.random.default_rng(seed).integers(-1024, 32768, shape).astype(np.int16)
    image = nib.Nifti1Image(hu, file_affine)
    image.header.set_sform(file_affine, 1)
    nib.save(image, folder / "ct.nii")
    one(folder / "ct.nii", folder / "ct.b2nd", overwrite=True, allow_no_air=True)  # of a few random voxels
    original, stored = read_nifti(folder / "ct.nii"), open_store(folder / "ct.b2nd")
    np.testing.assert_array_equal(stored.hu[...], original.hu)
    np.testing.assert_array_equal(stored.affine, original.affine)
    assert stored.hu.dtype == np.int16


def test_t30_rounded_and_clipped_voxels_are_counted(tmp_path):
    values = np.zeros((4, 4, 4), np.float32)
    values.flat[:4] = [1.5, 40000, -40000, 32767.4]
    nib.save(nib.Nifti1Image(values, np.diag([-1.0, -1, 1, 1])), tmp_path / "ct.nii")
    one(tmp_path / "ct.nii", tmp_path / "ct.b2nd")
    stored = open_store(tmp_path / "ct.b2nd")
    assert (stored.metadata["rounded_voxels"], stored.metadata["clipped_voxels"]) == (2, 2)
    assert sorted(np.unique(stored.hu[...])) == [-1024, 0, 2, 32767]  # -32768 is padding


@pytest.mark.parametrize("grid", [None, [5, 6, 7]])
@pytest.mark.parametrize("padding", [-3024, -2000, -1025])
def test_t21_padding_of_a_nifti_file_is_floored_before_it_is_resampled(tmp_path, grid, padding):
    padded, clean = volume(shape=(10, 12, 14)), volume(shape=(10, 12, 14))
    padded.hu[:, :3], clean.hu[:, :3] = padding, -1024
    write_nifti(tmp_path / "padded.nii.gz", padded)
    write_nifti(tmp_path / "clean.nii.gz", clean)
    for name in ("padded", "clean"):
        one(tmp_path / f"{name}.nii.gz", tmp_path / f"{name}.b2nd", grid=grid)
    stored, expected = open_store(tmp_path / "padded.b2nd"), open_store(tmp_path / "clean.b2nd")
    np.testing.assert_array_equal(stored.hu[...], expected.hu[...])
    assert stored.metadata["body"] == expected.metadata["body"]
    assert (stored.metadata["padded_voxels"], expected.metadata["padded_voxels"]) == (10 * 3 * 14, 0)


@pytest.mark.parametrize("how", ["in [0, 1]", "shifted"])
def test_a_volume_that_is_not_in_hu_is_refused(tmp_path, how):
    chest = volume().hu.T
    values = (chest + 1024) / 4096 if how == "in [0, 1]" else chest + 1024
    nib.save(nib.Nifti1Image(values.astype(np.float32), np.diag([-1.0, -1, 1, 1])), tmp_path / "ct.nii")
    with pytest.raises(InputError, match=r"ct\.nii: no voxel is below -300 HU.*--allow-no-air"):
        one(tmp_path / "ct.nii", tmp_path / "ct.b2nd")
    assert not (tmp_path / "ct.b2nd").exists()
    assert_one_line_error(build(tmp_path, tmp_path / "out", check=3), "ct.nii", "--allow-no-air")
    build(tmp_path, tmp_path / "out", "--allow-no-air")
    assert open_store(tmp_path / "out" / "ct.b2nd").shape == volume().hu.shape


def test_a_volume_that_lost_its_geometry_is_stored_and_verified_with_a_warning(tmp_path, caplog):
    for name, affine in (("lost", np.eye(4)), ("kept", np.diag([1, 1, 2, 1])), ("moved", np.eye(4))):
        affine[0, 3] = 5 * (name == "moved")
        nib.save(nib.Nifti1Image(volume().hu.T, affine), tmp_path / f"{name}.nii.gz")
        one(tmp_path / f"{name}.nii.gz", tmp_path / f"{name}.b2nd")
    assert [record.getMessage() for record in caplog.records] == [f"{tmp_path / 'lost.nii.gz'}: {NO_GEOMETRY}"]
    caplog.clear()
    assert verify_files(sorted(tmp_path.glob("*.*")), None) == []
    names = [record.getMessage().split(":")[0] for record in caplog.records]
    assert names == [str(tmp_path / "lost.b2nd"), str(tmp_path / "lost.nii.gz")]


def test_grids():
    assert parse_grid("native") is None
    assert parse_grid("256x256x64") == parse_grid("256×256×64") == [64, 256, 256]
    assert parse_grid("512x512x604") == [604, 512, 512]
    assert grid_name([64, 128, 256]) == "256x128x64"
    for text in ("", "256", "256x256", "0x256x64", "256x256x64x2", "axbxc", "99999x2x2", "-2x3x4"):
        with pytest.raises(ArgumentTypeError, match="native, or a size"):
            parse_grid(text)


SIDECAR = {"format": 1, "shape_dhw": [20, 32, 40], "kvp": 120.0, "kernel": "B31f", "patient": "0123456789ab"}


def test_the_sidecar_of_dicom_to_nifti_goes_into_the_store(source, tmp_path):
    (source / "a.json").write_text(json.dumps(SIDECAR | {"PatientName": "CANARY^JANE"}))
    (source / "b.json").write_text(json.dumps({"PatientName": "CANARY^JANE", "Manufacturer": "GE"}))  # dcm2niix
    result = build(source, tmp_path / "out")
    assert open_store(tmp_path / "out" / "a.b2nd").metadata["sidecar"] == SIDECAR
    assert open_store(tmp_path / "out" / "b.b2nd").metadata["sidecar"] == {}
    assert f"{source / 'a.json'}: 1 fields not of dicom_to_nifti" in result.stderr
    assert f"{source / 'b.json'}: not written by dicom_to_nifti" in result.stderr
    assert b"CANARY" not in b"".join(contents(tmp_path / "out").values())


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "no readable JSON"), (json.dumps(SIDECAR | {"shape_dhw": [1, 2, 3]}), "belongs to another volume")],
)
def test_a_wrong_sidecar_is_refused(source, tmp_path, text, reason):
    (source / "a.json").write_text(text)
    with pytest.raises(InputError, match=f"^{source / 'a.json'}: .*{reason}"):
        one(source / "a.nii.gz", tmp_path / "a.b2nd", sidecar=str(source / "a.json"))
    assert not (tmp_path / "a.b2nd").exists()


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="shared/data is not here: no real CT to store")
def test_real_volumes(tmp_path):
    build(REAL_DATA / "fixtures", tmp_path / "out")
    for name in ("cip_ct64", "totalseg_pulmonary_ctacrop"):
        stored, original = (
            open_store(tmp_path / "out" / f"{name}.b2nd"),
            read_nifti(REAL_DATA / "fixtures" / f"{name}.nii.gz"),
        )
        np.testing.assert_array_equal(stored.hu[...], original.hu)
        np.testing.assert_array_equal(stored.affine, original.affine)
    body = open_store(tmp_path / "out" / "cip_ct64.b2nd").metadata["body"]
    assert 0.1 < body["share_lung"] < 0.3
    assert 0.4 < body["share_body"] < 0.9


@pytest.mark.slow
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="shared/data is not here: no real CT to store")
def test_every_real_volume(tmp_path):
    build(REAL_DATA, tmp_path / "out", "--workers", "2")
    paths = sorted((tmp_path / "out").rglob("*.b2nd"))
    assert len(paths) == len(list(REAL_DATA.rglob("*.nii.gz")))
    assert verify_files(paths, None) == []
    raw = sum(2 * int(np.prod(open_store(path).hu.shape)) for path in paths)
    assert sum(path.stat().st_size for path in paths) < 0.45 * raw
