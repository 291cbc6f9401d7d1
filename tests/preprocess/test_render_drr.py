"""Radiographs rendered from CT: physics, geometry, sides, and the command."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from scipy import ndimage

from dataset.phantom import LABELS, affine_of, make_phantom
from dataset.projection import cone_geometry, project_parallel, ray_of_pixel, voxel_to_world, voxels_on_ray
from dataset.volume_io import Volume, write_nifti
from dataset.xray import load_xray
from dataset.xray_drr import read_line_integrals
from errors import ConfigurationError, InputError
from params import MU_WATER_PER_MM
from preprocess.drr_body import Body, body_mask, isolate_body
from preprocess.drr_render import Stand, fit_geometry, render
from preprocess.render_drr import main, parse_arguments, render_one
from tests.helpers import REAL_DATA, assert_one_line_error, run

SCRIPT = "preprocess/render_drr.py"
VIEWS = ("frontal", "lateral")


def box_of(hu):
    """A body that is everything."""
    return Body(hu, ((0, 0, 0), hu.shape), 0)


def water(shape=(40, 50, 60), spacing=(3.0, 2.0, 2.0)):
    return np.zeros(shape, np.int16), affine_of(shape, spacing)


def test_beer_lambert_along_the_central_ray():
    hu, affine = water()
    geometry = cone_geometry("frontal", (0, 0, 0), (31, 31), 3.0)
    picture = render(box_of(hu), affine, geometry)
    assert picture.dtype == np.float32
    # 50 voxels of 2 mm; the interpolation fades over half a voxel at either face and keeps the integral
    assert picture[15, 15] == pytest.approx(MU_WATER_PER_MM * 100, rel=2e-3)
    # an oblique ray is longer by the cosine
    ray = ray_of_pixel(geometry, 0, 15)
    assert picture[0, 15] == pytest.approx(MU_WATER_PER_MM * 100 / ray.direction[1], rel=2e-3)


@pytest.mark.parametrize("view", VIEWS)
def test_a_planted_voxel_is_found_at_its_pixel_and_back_along_the_ray(view):
    """Source, detector, affine and voxel order agree between the renderer and the stored geometry."""
    shape = (40, 50, 60)
    affine = affine_of(shape, (3.0, 2.0, 2.5))
    turn = np.eye(4)
    turn[:3, :3] = [[0.98, -0.198997, 0], [0.198997, 0.98, 0], [0, 0, 1]]  # an oblique volume
    affine = turn @ affine
    affine[:3, 3] += (30, -60, 500)
    for voxel in ((8, 10, 50), (33, 41, 12)):
        hu = np.full(shape, -1000, np.int16)
        hu[voxel] = 3000
        point = voxel_to_world(np.array(voxel), affine)
        geometry = cone_geometry(view, affine[:3, :3] @ (np.array(shape) / 2) + affine[:3, 3], (160, 160), 1.5)
        picture = render(box_of(hu), affine, geometry)
        expected = geometry.project(point)
        assert np.allclose(ndimage.center_of_mass(picture), expected, atol=0.15)
        indices, _ = voxels_on_ray(ray_of_pixel(geometry, *ndimage.center_of_mass(picture)), affine, shape, 0.25)
        assert np.abs(indices - voxel).max(axis=1).min() < 0.25


def test_the_cone_magnifies_what_is_near_the_source():
    """Two beads 100 mm apart at the isocentre are 110 mm apart on the detector, more behind it, less before it."""
    shape = (60, 60, 60)
    affine = affine_of(shape, (2.0, 2.0, 2.0))
    geometry = cone_geometry("frontal", (0, 0, 0), (256, 256), 1.0)
    apart = {}
    for h in (5, 30, 55):
        hu = np.full(shape, -1000, np.int16)
        hu[30, h, [5, 55]] = 3000
        picture = render(box_of(hu), affine, geometry)
        left, right = (ndimage.center_of_mass(np.where(side, picture, 0))[1] for side in halves(picture.shape))
        apart[h] = right - left
        at = voxel_to_world(np.array([30, h, 30]), affine)
        assert apart[h] == pytest.approx(100 * geometry.magnification(at), abs=0.3)
    assert apart[30] == pytest.approx(110.4, abs=0.6)
    assert apart[55] > apart[30] > apart[5], "the back is nearer to the source of a PA picture"


def halves(shape):
    columns = np.arange(shape[1])[None].repeat(shape[0], 0)
    return columns < shape[1] / 2, columns >= shape[1] / 2


@pytest.mark.parametrize("view", VIEWS)
def test_a_far_source_gives_the_parallel_projection(view):
    """nanodrr and the project's own projector agree where the cone has become a beam."""
    phantom = make_phantom(3, (40, 48, 52))
    spacing = phantom.spacing_mm
    hu = np.maximum(phantom.hu, -1000)
    parallel = project_parallel(torch.from_numpy(hu), spacing, view).numpy()
    pixel = spacing[2] if view == "frontal" else spacing[1]
    rows = round(parallel.shape[0] * spacing[0] / pixel)
    geometry = cone_geometry(
        view, (0, 0, 0), (rows, parallel.shape[1]), pixel, source_detector_mm=2e5 + 500, source_isocentre_mm=2e5
    )
    picture = render(box_of(hu), phantom.affine, geometry)
    # onto the parallel picture's rows, which are as far apart as slices
    at = ((np.arange(parallel.shape[0]) + 0.5) * spacing[0] / pixel) - 0.5
    resampled = ndimage.map_coordinates(
        picture, np.meshgrid(at, np.arange(parallel.shape[1]), indexing="ij"), order=1, mode="nearest"
    )
    inside = (slice(2, -2), slice(2, -2))
    difference = np.abs(resampled - parallel)[inside]
    assert difference.mean() < 0.01 * parallel.max()
    assert np.corrcoef(resampled[inside].ravel(), parallel[inside].ravel())[0, 1] > 0.999


def test_a_drr_is_upright_and_not_mirrored():
    phantom = make_phantom(3, (48, 64, 64))
    spots = {}
    for name in ("liver", "left_ventricle", "stomach_gas", "lung_right", "lung_left", "sternum", "spine"):
        hu = np.where(phantom.labels == LABELS[name], np.int16(1000), np.int16(-1000))
        for view in VIEWS:
            geometry, _ = fit_geometry(box_of(hu), phantom.affine, Stand(columns=64), view)
            spots[name, view] = ndimage.center_of_mass(render(box_of(hu), phantom.affine, geometry))
    assert spots["liver", "frontal"][1] < 31.5 < spots["left_ventricle", "frontal"][1], "heart apex on the right"
    assert spots["stomach_gas", "frontal"][1] > 31.5, "stomach bubble on the right"
    assert spots["lung_right", "frontal"][1] < spots["lung_left", "frontal"][1]
    assert spots["sternum", "lateral"][1] < spots["spine", "lateral"][1], "chest on the left"
    for view in VIEWS:
        assert spots["liver", view][0] > spots["lung_right", view][0], "head up"


def test_rows_that_would_fade_out_are_cut():
    hu, affine = water((100, 100, 150), (3.0, 2.0, 2.0))
    for view in VIEWS:
        geometry, isocentre = fit_geometry(box_of(hu), affine, Stand(columns=256), view)
        np.testing.assert_allclose(isocentre, (0, 0, 0), atol=1e-9)
        picture = render(box_of(hu), affine, geometry)
        # a block of water is as bright in the first and last row as in the middle, but for the oblique path
        middle = picture[:, 128]
        assert middle[[1, -2]] == pytest.approx(middle[len(middle) // 2], rel=0.02)
        # not more was cut than the cone costs: about a tenth of the thickness of the body
        seen_mm = geometry.shape[0] * geometry.pixel_spacing_mm[0] / geometry.magnification(isocentre)
        assert 300 - 0.14 * (200 if view == "frontal" else 300) < seen_mm < 300


def test_the_stand_keeps_its_distances():
    hu, affine = water((100, 100, 150), (3.0, 2.0, 2.0))
    geometry, isocentre = fit_geometry(box_of(hu), affine, Stand(gap_mm=50.0), "frontal")
    front = geometry.source_mm[1] + 1800
    assert front - 100 == pytest.approx(50), "the chest is 50 mm from the detector"
    assert geometry.magnification(isocentre) == pytest.approx(1800 / 1650)
    for bad in ({"columns": 3}, {"field_mm": 0}, {"field_mm": float("nan")}, {"gap_mm": -1}, {"gap_mm": 1800}):
        with pytest.raises(ConfigurationError, match="--"):
            Stand(**bad)
    with pytest.raises(ConfigurationError, match="do not fit"):
        fit_geometry(box_of(hu), affine, Stand(source_detector_mm=240, gap_mm=50), "frontal")


def couch_scan():
    """A phantom with lungs above a couch top, a wire and a blanket; where the couch is."""
    phantom = make_phantom(5, (24, 128, 128), (12.0, 3.0, 3.0))
    hu, couch = phantom.hu.copy(), np.zeros(phantom.hu.shape, bool)
    back = max(np.flatnonzero((phantom.labels > 0).any(axis=(0, 2)))) + 1
    couch[:, back + 2 : back + 3, 20:110] = True
    couch[:, 4:5, 30:90] = True
    hu[couch] = 300
    return phantom, hu, couch


def test_the_couch_is_removed_and_the_patient_is_not():
    phantom, hu, couch = couch_scan()
    mask = body_mask(hu, phantom.affine)
    truth = phantom.labels > 0
    assert (mask & truth).sum() > 0.995 * truth.sum()
    lungs = phantom.mask("lungs")
    assert mask[lungs].mean() > 0.999
    assert (mask & ~truth).sum() < 0.12 * truth.sum(), "a rim of a voxel or two"
    body = isolate_body(hu, phantom.affine)
    assert not (body.hu[couch] > -900).any()
    assert body.removed_voxels >= couch.sum()
    np.testing.assert_array_equal(body.hu[mask], hu[mask])
    assert hu[couch].min() == 300, "the original is not touched"
    low, high = body.bounding_box_vox
    assert body.hu[tuple(map(slice, low, high))].size < hu.size


def test_the_couch_leaves_no_shadow():
    phantom, hu, _ = couch_scan()
    clean, dirty = isolate_body(phantom.hu, phantom.affine), isolate_body(hu, phantom.affine)
    geometry, _ = fit_geometry(clean, phantom.affine, Stand(columns=64), "frontal")
    difference = np.abs(render(clean, phantom.affine, geometry) - render(dirty, phantom.affine, geometry))
    assert difference.max() < 0.05


def test_a_scan_without_an_outside_is_all_body():
    phantom = make_phantom(5, (24, 64, 64))
    inner = phantom.hu[:, 20:44, 20:44]
    assert body_mask(inner, phantom.affine).all()


def test_air_is_no_patient():
    with pytest.raises(InputError, match="no body"):
        isolate_body(np.full((20, 30, 40), -1000, np.int16), np.eye(4))


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Two phantoms in folders and a file that is none."""
    root = tmp_path_factory.mktemp("scans")
    (root / "site").mkdir()
    for seed, name in ((3, "a.nii.gz"), (4, "site/b.nii")):
        phantom = make_phantom(seed, (40, 48, 48))
        write_nifti(root / name, Volume(phantom.hu, phantom.affine))
    return root


def call(*arguments):
    return main(parse_arguments([str(argument) for argument in arguments]))


def test_the_command_renders_a_tree(scans, tmp_path):
    assert call("--input", scans, "--output", tmp_path, "--size", 96) == 0
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    stems = ("a_frontal", "a_lateral", "site/b_frontal", "site/b_lateral")
    assert names == sorted([f"{stem}.{kind}" for stem in stems for kind in ("png", "json")] + ["render_drr.json"])
    report = json.loads((tmp_path / "render_drr.json").read_text())
    assert set(report["records"]) == {"a", "site/b"}

    integrals, info = read_line_integrals(tmp_path / "a_frontal.png")
    phantom = make_phantom(3, (40, 48, 48))
    assert integrals.shape == info.geometry.shape
    assert 3 < integrals.max() < 10
    np.testing.assert_allclose(info.affine, phantom.affine, atol=1e-4)
    assert info.shape_dhw == (40, 48, 48)
    assert 1.05 < info.details["magnification_at_isocentre"] < 1.2
    # a pixel is followed into the volume: the integral along its ray is the picture's value
    row, column = (length // 2 for length in integrals.shape)
    indices, _ = voxels_on_ray(ray_of_pixel(info.geometry, row, column), info.affine, info.shape_dhw, 0.5)
    samples = ndimage.map_coordinates(np.maximum(phantom.hu, -1000.0), indices.T, order=1, mode="nearest")
    along = float(((samples + 1000) / 1000).sum() * 0.5 * MU_WATER_PER_MM)
    assert integrals[row, column] == pytest.approx(along, rel=0.05)

    xray = load_xray(tmp_path / "a_frontal.png", 64, view="frontal")
    assert xray.image.shape == (1, 64, 64)
    assert xray.pixel_spacing_mm is not None


def test_the_same_volume_gives_the_same_bytes_and_resuming_repeats_nothing(scans, tmp_path):
    arguments = ("--size", 64, "--views", "frontal")
    for folder in ("one", "two"):
        assert call("--input", scans, "--output", tmp_path / folder, *arguments) == 0
    for name in ("a_frontal.png", "a_frontal.json", "site/b_frontal.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    before = (tmp_path / "one" / "a_frontal.png").stat().st_mtime_ns
    (tmp_path / "one" / "site/b_frontal.png").write_bytes(b"damaged")
    assert call("--input", scans, "--output", tmp_path / "one", *arguments, "--resume") == 0
    assert (tmp_path / "one" / "a_frontal.png").stat().st_mtime_ns == before
    assert (tmp_path / "one" / "site/b_frontal.png").stat().st_size > 100


def test_one_bad_volume_does_not_stop_the_rest(scans, tmp_path, capsys):
    shutil.copytree(scans, tmp_path / "in")
    (tmp_path / "in" / "bad.nii.gz").write_bytes(b"nothing of the kind" * 40)
    phantom = make_phantom(3, (40, 48, 48))
    write_nifti(tmp_path / "in" / "flat.nii", Volume(phantom.hu[:2], phantom.affine))
    assert call("--input", tmp_path / "in", "--output", tmp_path / "out", "--size", 64, "--views", "frontal") == 4
    assert (tmp_path / "out" / "a_frontal.png").exists()
    failures = json.loads((tmp_path / "out" / "render_drr.json").read_text())["failures"]
    assert set(failures) == {"bad", "flat"}
    assert "too few slices" in failures["flat"]
    assert "flat.nii" in failures["flat"]
    assert not list((tmp_path / "out").rglob("bad*"))
    assert "2 of 4 failed" in capsys.readouterr().err


def test_stores_are_rendered_like_the_files_they_came_from(scans, tmp_path):
    store = pytest.importorskip("dataset.store", reason="dataset/store.py is not there yet")
    phantom = make_phantom(3, (40, 48, 48))
    store.write_store(tmp_path / "a.b2nd", Volume(phantom.hu, phantom.affine), {})
    stand = {"columns": 64}
    render_one(str(tmp_path / "a.b2nd"), str(tmp_path / "s"), ["frontal"], stand)
    render_one(str(scans / "a.nii.gz"), str(tmp_path / "n"), ["frontal"], stand)
    ours, theirs = (read_line_integrals(tmp_path / f"{name}_frontal.png")[0] for name in "sn")
    np.testing.assert_allclose(ours, theirs, atol=1e-3)  # NIfTI keeps affines in float32


def test_empty_and_missing_folders_are_bad_input(tmp_path):
    (tmp_path / "in").mkdir()
    for folder, word in (("in", "no .nii"), ("gone", "not a folder")):
        with pytest.raises(InputError, match=word):
            call("--input", tmp_path / folder, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_script_runs_from_anywhere_and_fails_in_one_line(scans, tmp_path):
    options = ("--output", str(tmp_path / "out"), "--size", "64", "--views", "frontal")
    result = run(SCRIPT, "--input", str(scans), *options, cwd=tmp_path, tiny=False)
    assert "2 of 2 volumes rendered" in result.stdout
    result = run(SCRIPT, "--input", str(tmp_path / "gone"), *options, cwd=tmp_path, tiny=False, check=3)
    assert_one_line_error(result, "gone", "not a folder")
    result = run(SCRIPT, "--input", str(scans), *options, "--gap-mm", "-5", cwd=tmp_path, tiny=False, check=2)
    assert_one_line_error(result, "--gap-mm -5")
    workers = ("--output", str(tmp_path / "two"), "--size", "64", "--views", "frontal", "--workers", "2")
    run(SCRIPT, "--input", str(scans), *workers, cwd=tmp_path, tiny=False)
    for name in ("a_frontal.png", "a_frontal.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the real data of ../shared/data are not here")
@pytest.mark.parametrize("name", ["ct_2mm/pyradiomics_lung2", "ct_native/lidc_0001", "fixtures/cip_ct64"])
def test_real_volumes_look_like_radiographs(name, tmp_path):
    record = render_one(str(REAL_DATA / f"{name}.nii.gz"), str(tmp_path / "a"), list(VIEWS), {"columns": 128})
    assert record["pictures"]["frontal"]["clipped_pixels"] == 0
    frontal = load_xray(tmp_path / "a_frontal.png", 128, view="frontal").image[0]
    # lungs dark on either side of a bright mediastinum, abdomen bright below
    rows = torch.where(frontal.sum(1) > 0)[0]
    top, height = int(rows[0]), int(rows[-1] - rows[0])
    chest, belly = (
        frontal[top + int(0.3 * height) : top + int(0.5 * height)],
        frontal[top + int(0.85 * height) : rows[-1]],
    )
    middle = chest[:, 56:72].mean()
    assert middle > chest[:, 24:44].mean() + 0.15
    assert middle > chest[:, 84:104].mean() + 0.1
    assert belly[:, 40:88].mean() > chest[:, 24:44].mean() + 0.15
