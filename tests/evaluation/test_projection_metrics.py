"""Agreement with a radiograph: correlations with known answers, mirror images, and the cone beam."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.body import isolate_body
from dataset.drr_render import Stand, fit_geometry, render
from dataset.phantom import make_phantom
from errors import InputError
from evaluation.metrics.projection import chirality, cone_ncc, mirror, ncc, projection_ncc, radiograph

SPACING = (10.0, 6.5, 6.5)


@pytest.fixture(scope="module")
def phantoms():
    return [make_phantom(seed, (32, 64, 64), SPACING) for seed in (3, 11)]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 100), st.floats(-100, 100))
def test_ncc_ignores_gain_and_offset(seed, gain, offset):
    picture = np.random.default_rng(seed).normal(size=(5, 7))
    assert ncc(picture, gain * picture + offset) == pytest.approx(1.0)
    assert ncc(picture, -gain * picture + offset) == pytest.approx(-1.0)


def test_ncc_is_pearsons_r_under_the_mask():
    rng = np.random.default_rng(0)
    a, b, mask = rng.normal(size=(6, 6)), rng.normal(size=(6, 6)), rng.random((6, 6)) > 0.5
    assert ncc(a, b) == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1])
    assert ncc(a, b, mask) == pytest.approx(np.corrcoef(a[mask], b[mask])[0, 1])


def test_ncc_of_nothing_is_nan():
    ones, ramp = np.ones((4, 4)), np.arange(16.0).reshape(4, 4)
    assert math.isnan(ncc(ones, ramp))
    assert math.isnan(ncc(ramp, np.where(ramp == 3, np.nan, ramp)))
    assert math.isnan(ncc(ramp, ramp, np.zeros((4, 4), bool)))
    with pytest.raises(InputError, match="one grid"):
        ncc(ramp, ramp[:2])


def test_a_volume_agrees_with_itself_more_than_with_another(phantoms):
    own, other = (one.hu for one in phantoms)
    same = projection_ncc(own, own, SPACING)
    crossed = projection_ncc(other, own, SPACING)
    assert same["drr_ncc"] == pytest.approx(1.0)
    assert same["drr_ncc_body"] == pytest.approx(1.0)
    assert crossed["drr_ncc"] < 0.99
    assert crossed["drr_ncc_body"] < crossed["drr_ncc"]  # without the outline there is less to agree on


def test_depth_does_not_show_in_a_frontal_projection(phantoms):
    hu = phantoms[0].hu
    assert projection_ncc(hu[:, ::-1], hu, SPACING)["drr_ncc"] == pytest.approx(1.0)
    assert projection_ncc(hu[:, ::-1], hu, SPACING, "lateral")["drr_ncc"] < 0.99


def test_chirality_changes_sign_with_the_side(phantoms):
    for one in phantoms:
        picture = radiograph(one.hu, SPACING)
        right, wrong = chirality(one.hu, picture, SPACING), chirality(mirror(one.hu), picture, SPACING)
        assert right > 0.01
        assert wrong == pytest.approx(-right, abs=1e-6)
    symmetric = phantoms[0].hu.astype(np.float32) + mirror(phantoms[0].hu)
    assert chirality(symmetric, radiograph(phantoms[0].hu, SPACING), SPACING) == pytest.approx(0.0, abs=1e-6)


def test_chirality_knows_the_patients_left():
    """A dense ball on the patient's left (high w) appears on the picture's right."""
    hu = np.full((8, 8, 16), -1000.0)
    hu[3, 4, 13] = 1000.0
    picture = np.zeros((8, 16))
    picture[4, 13] = 1.0  # rows run against D
    assert chirality(hu, picture, (1.0, 1.0, 1.0)) == pytest.approx(1.0, abs=0.02)


def test_cone_projection_tells_own_from_other_and_mirrored(phantoms):
    own, other = phantoms
    body = isolate_body(own.hu, own.affine)
    geometry, _ = fit_geometry(body, own.affine, Stand(columns=64), "frontal")
    picture = render(body, own.affine, geometry)
    same = cone_ncc(own.hu, own.affine, picture, geometry, step=2)
    assert same > 0.995
    assert cone_ncc(other.hu, own.affine, picture, geometry, step=2) < same - 0.01
    assert cone_ncc(mirror(own.hu), own.affine, picture, geometry, step=2) < same - 0.01
    assert math.isnan(cone_ncc(own.hu * np.nan, own.affine, picture, geometry))
    with pytest.raises(InputError, match="differ"):
        cone_ncc(own.hu, own.affine, picture[1:], geometry)
