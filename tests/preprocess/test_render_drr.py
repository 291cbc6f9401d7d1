"""Radiographs rendered from CT: the command."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from scipy import ndimage

from dataset.phantom import make_phantom
from dataset.projection import ray_of_pixel, voxels_on_ray
from dataset.store import write_store
from dataset.volume_io import Volume, write_nifti
from dataset.xray import load_xray
from dataset.xray_drr import read_line_integrals
from errors import ConfigurationError, InputError
from params import MU_WATER_PER_MM
from preprocess.render_drr import main, parse_arguments, render_one
from tests.helpers import REAL_DATA, assert_one_line_error, run

SCRIPT = "preprocess/render_drr.py"
VIEWS = ("frontal", "lateral")


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
    phantom = make_phantom(3, (40, 48, 48))
    write_store(tmp_path / "a.b2nd", Volume(phantom.hu, phantom.affine), {})
    stand = {"columns": 64}
    render_one(str(tmp_path / "a.b2nd"), str(tmp_path / "s"), ["frontal"], stand)
    render_one(str(scans / "a.nii.gz"), str(tmp_path / "n"), ["frontal"], stand)
    ours, theirs = (read_line_integrals(tmp_path / f"{name}_frontal.png")[0] for name in "sn")
    np.testing.assert_allclose(ours, theirs, atol=1e-3)  # NIfTI keeps affines in float32


def test_empty_and_missing_folders_are_bad_input(tmp_path):
    (tmp_path / "in").mkdir()
    for folder, error, word in (("in", InputError, "holds no .nii"), ("gone", ConfigurationError, "no such folder")):
        with pytest.raises(error, match=word):
            call("--input", tmp_path / folder, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_script_runs_from_anywhere_and_fails_in_one_line(scans, tmp_path):
    options = ("--output", str(tmp_path / "out"), "--size", "64", "--views", "frontal")
    result = run(SCRIPT, "--input", str(scans), *options, cwd=tmp_path, tiny=False)
    assert "2 of 2 volumes rendered" in result.stdout
    result = run(SCRIPT, "--input", str(tmp_path / "gone"), *options, cwd=tmp_path, tiny=False, check=2)
    assert_one_line_error(result, "gone", "no such folder")
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
