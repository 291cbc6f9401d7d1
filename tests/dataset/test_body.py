"""Where the body is: exact on boxes, close to the truth of phantoms, without the couch."""

from __future__ import annotations

import numpy as np
import pytest

from dataset.body import body_mask, body_metadata, isolate_body
from dataset.drr_render import Stand, fit_geometry, render
from dataset.patch_sampling import read_body
from dataset.phantom import affine_of, make_phantom
from dataset.store import open_store, write_store
from dataset.volume_io import Volume, read_nifti
from errors import InputError
from tests.helpers import REAL_DATA

# of `ellipse`: 4 mm
AFFINE = affine_of((60, 80, 100), (4.0, 4.0, 4.0))


def ellipse(shape: tuple[int, int, int] = (60, 80, 100)) -> tuple[np.ndarray, np.ndarray]:
    """A body with two lungs, and a table below it that does not touch; HU and the true body."""
    d, h, w = np.ogrid[: shape[0], : shape[1], : shape[2]]
    body = ((h - 35) / 25) ** 2 + ((w - 50) / 35) ** 2 + 0 * d < 1
    lungs = sum(((h - 35) / 14) ** 2 + ((w - x) / 10) ** 2 + 0 * d < 1 for x in (35, 65)) > 0
    hu = np.where(body, 40, -1000).astype(np.int16)
    hu[lungs] = -850
    hu[:, 72:74, 20:80] = 0
    return hu, body


def test_the_map_is_the_body_with_its_lungs_and_without_the_table() -> None:
    hu, body = ellipse()
    entry = body_metadata(hu, AFFINE)
    found = read_body({"body": entry}, hu.shape)
    assert found is not None
    mask = np.zeros(entry["map"]["cells"], bool)
    mask[tuple(found.cells.T)] = True
    mask = np.kron(mask, np.ones(found.cell_vox, bool))[tuple(slice(n) for n in hu.shape)]
    assert (mask & body).sum() / (mask | body).sum() > 0.9
    assert not mask[:, 70:].any()
    assert mask[30, 35, 35]
    assert mask[30, 35, 65]
    (d0, h0, w0), (d1, h1, w1) = entry["bounding_box_vox"]
    assert (d0, d1) == (0, 60)
    assert abs(h0 - 10) <= 3
    assert abs(h1 - 60) <= 3
    assert abs(w0 - 15) <= 3
    assert abs(w1 - 85) <= 3


def test_air_alone_is_body_everywhere() -> None:
    hu = np.full((5, 6, 7), -1000, np.int16)
    body = read_body({"body": body_metadata(hu, AFFINE)}, hu.shape)
    assert body is not None
    assert len(body.cells) == 5 * 6 * 7


def test_body_of_a_box_with_holes():
    hu = np.full((20, 30, 40), -1000, np.int16)
    hu[3:17, 5:25, 8:32] = 40
    hu[5:15, 10:20, 10:16] = hu[5:15, 10:20, 24:30] = -850  # lungs
    hu[0:2, 0:2, 0:2] = 200  # a table
    body = body_metadata(hu, affine_of(hu.shape, (3.0, 3.0, 3.0)))
    assert body["bounding_box_vox"] == [[3, 5, 8], [17, 25, 32]]
    assert body["share_body"] == round(14 * 20 * 24 / hu.size, 6)
    assert body["share_lung"] == round(2 * 10 * 10 * 6 / hu.size, 6)
    assert body["share_tissue"] == pytest.approx(body["share_body"] - body["share_lung"], abs=1e-6)
    assert body["share_air"] == pytest.approx(1 - body["share_body"], abs=1e-6)
    assert body["hu_percentiles"] == {"1": -850, "5": -850, "25": 40, "50": 40, "75": 40, "95": 40, "99": 40}


def test_body_box_covers_the_body_on_a_fine_grid():
    hu = np.full((40, 300, 300), -1000, np.int16)
    hu[7:33, 101:233, 50:251] = 40
    low, high = body_metadata(hu, affine_of(hu.shape, (2.5, 0.7, 0.7)))["bounding_box_vox"]
    assert np.all(np.array(low) <= [7, 101, 50])
    assert np.all(np.array(high) >= [33, 233, 251])
    assert np.all(np.array([7, 101, 50]) - low <= 4)
    assert np.all(np.array(high) - [33, 233, 251] <= 4)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 4, 5), (1, 64, 64)])
def test_a_volume_without_a_body(shape):
    body = body_metadata(np.full(shape, -1000, np.int16), np.eye(4))
    assert body["bounding_box_vox"] == [[0, 0, 0], list(shape)]
    assert (body["share_body"], body["share_air"], body["hu_percentiles"]) == (0, 1, {})
    full = body_metadata(np.full(shape, 40, np.int16), np.eye(4))
    assert (full["bounding_box_vox"], full["share_tissue"]) == ([[0, 0, 0], list(shape)], 1)


def test_the_body_of_a_phantom():
    phantom = make_phantom(3, (64, 96, 96))
    body = body_metadata(phantom.hu, phantom.affine)
    assert body["share_body"] == pytest.approx(phantom.body_mask.mean(), abs=0.02)
    assert body["share_lung"] == pytest.approx(phantom.mask("lungs").mean(), abs=0.03)


@pytest.mark.parametrize("shape", [(70, 90, 41), (33, 100, 120), (1, 64, 64), (40, 1, 1)])
@pytest.mark.parametrize("mm", [0.1, 0.7, 5.0])
def test_a_store_gives_what_its_voxels_give_at_any_size(shape, mm, tmp_path):
    rng = np.random.default_rng(0)
    hu = np.where(rng.random(shape) < 0.7, 40, -1000).astype(np.int16)
    hu[:, :, : shape[2] // 3] = -1000
    affine = affine_of(shape, (mm, mm, mm))
    write_store(tmp_path / "a.b2nd", Volume(hu, affine), {})
    entry = body_metadata(hu, affine)
    assert body_metadata(open_store(tmp_path / "a.b2nd").hu, affine) == entry
    found = read_body({"body": entry}, shape)
    assert found is not None
    assert len(found.cells) > 0


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


def test_a_scan_without_an_outside_is_all_body():
    phantom = make_phantom(5, (24, 64, 64))
    inner = phantom.hu[:, 20:44, 20:44]
    assert body_mask(inner, phantom.affine).all()


def test_air_is_no_patient():
    with pytest.raises(InputError, match="no body"):
        isolate_body(np.full((20, 30, 40), -1000, np.int16), np.eye(4))


def test_the_couch_leaves_no_shadow():
    phantom, hu, _ = couch_scan()
    clean, dirty = isolate_body(phantom.hu, phantom.affine), isolate_body(hu, phantom.affine)
    geometry, _ = fit_geometry(clean, phantom.affine, Stand(columns=64), "frontal")
    difference = np.abs(render(clean, phantom.affine, geometry) - render(dirty, phantom.affine, geometry))
    assert difference.max() < 0.05


@pytest.mark.parametrize(("shape", "spacing"), [((16, 32, 32), (20.6, 13.4, 13.4)), ((32, 64, 64), (10.3, 6.7, 6.7))])
def test_coarse_phantoms_keep_their_chest_walls_and_lungs(shape, spacing):
    phantom = make_phantom(2, shape, spacing)
    mask = body_mask(phantom.hu, phantom.affine)
    assert mask[phantom.mask("lungs")].mean() > 0.99
    share = body_metadata(phantom.hu, phantom.affine)["share_body"]
    assert share == pytest.approx(phantom.body_mask.mean(), rel=0.1)


@pytest.mark.parametrize("name", ["ct_native/lidc_0001", "ct_2mm/cmbcrc_MSB-01068"])
def test_the_table_of_a_real_ct_is_not_body(name: str) -> None:
    path = REAL_DATA / f"{name}.nii.gz"
    if not path.exists():
        pytest.skip("shared/data is not here")
    volume = read_nifti(path)
    hu, entry = volume.hu, body_metadata(volume.hu, volume.affine)
    assert 0.3 < entry["share_body"] < 0.7
    body = read_body({"body": entry}, hu.shape)
    assert body is not None
    rng = np.random.default_rng(0)
    values = np.array([hu[body.draw(rng)] for _ in range(500)])
    assert (values > -950).mean() > 0.9  # uniform places are air for the most part
