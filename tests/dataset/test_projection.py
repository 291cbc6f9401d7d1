"""Rays and projections against answers that can be written down."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.phantom import LABELS, affine_of, make_phantom
from dataset.projection import (
    VIEWS,
    ConeGeometry,
    attenuation_per_mm,
    cone_geometry,
    line_integrals,
    project_parallel,
    ray_of_pixel,
    rays,
    voxel_to_world,
    voxels_on_ray,
    world_to_voxel,
)
from errors import ConfigurationError, InputError
from params import MU_WATER_PER_MM


@pytest.mark.parametrize("view", VIEWS)
def test_one_ray_through_a_unit_voxel_integrates_to_1(view):
    field = torch.zeros(4, 5, 6)
    field[1, 2, 3] = 1.0
    picture = line_integrals(field, (1, 1, 1), view)
    assert picture.shape == ((4, 6) if view == "frontal" else (4, 5))
    assert picture.sum() == 1
    # head up: slice 1 of 4 from below is row 2; columns run to the patient's left, or to the back
    assert picture[2, 3 if view == "frontal" else 2] == 1


def test_the_integral_is_in_millimetres():
    field = torch.ones(2, 3, 4, dtype=torch.float64)
    for view, expected in (("frontal", torch.full((2, 4), 3 * 0.7)), ("lateral", torch.full((2, 3), 4 * 0.5))):
        torch.testing.assert_close(line_integrals(field, (9.0, 0.7, 0.5), view), expected.double())


def test_batches_and_channels_pass():
    field = torch.rand(2, 3, 4, 5, 6)
    whole = line_integrals(field, (1, 2, 3))
    assert whole.shape == (2, 3, 4, 6)
    assert torch.equal(whole[1, 2], line_integrals(field[1, 2], (1, 2, 3)))


@pytest.mark.parametrize("view", VIEWS)
def test_a_ball_gives_its_chords(view):
    step, radius = 0.5, 20.0
    axis = (torch.arange(100) - 49.5) * step
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    # each voxel holds the share of itself that lies in the ball, to first order
    ball = ((radius - (z**2 + y**2 + x**2).sqrt()) / step + 0.5).clamp(0, 1)
    picture = line_integrals(ball, (step,) * 3, view)
    distance = (axis[:, None] ** 2 + axis[None] ** 2).sqrt()
    chord = 2 * (radius**2 - distance**2).clamp(min=0).sqrt()
    inside = distance < 0.95 * radius
    assert (picture - chord)[inside].abs().max() < 0.03 * radius
    assert (picture - chord)[inside].abs().mean() < 0.002 * radius
    assert picture[distance > radius + step].max() == 0


def test_attenuation_is_the_definition_of_the_hounsfield_unit():
    mu = attenuation_per_mm(torch.tensor([-3024, -1000, -500, 0, 1000], dtype=torch.int16))
    torch.testing.assert_close(mu, MU_WATER_PER_MM * torch.tensor([0, 0, 0.5, 1, 2]))


def test_beer_lambert_through_water():
    water = torch.zeros(3, 10, 3)
    transmitted = torch.exp(-project_parallel(water, (1, 2, 1)))
    torch.testing.assert_close(transmitted, torch.full((3, 3), float(np.exp(-0.0193 * 20))))


@pytest.mark.parametrize("view", VIEWS)
def test_the_projector_is_differentiable(view):
    field = torch.rand(3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: line_integrals(x, (1.0, 0.5, 2.0), view), field)
    hu = torch.full((3, 4, 2), 40.0, requires_grad=True)
    project_parallel(hu, (1.0, 0.5, 2.0), view).sum().backward()
    step = 0.5 if view == "frontal" else 2.0
    torch.testing.assert_close(hu.grad, torch.full((3, 4, 2), MU_WATER_PER_MM / 1000 * step))


def test_bad_calls_are_refused():
    with pytest.raises(ConfigurationError, match="oblique"):
        line_integrals(torch.zeros(2, 2, 2), (1, 1, 1), "oblique")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError):
        line_integrals(torch.zeros(2, 2), (1, 1, 1))
    with pytest.raises(ConfigurationError):
        line_integrals(torch.zeros(2, 2, 2), (1, 0, 1))
    with pytest.raises(ConfigurationError, match="between source and detector"):
        cone_geometry("frontal", (0, 0, 0), (4, 4), 1.0, source_isocentre_mm=1900)


def test_phantoms_are_upright_and_not_mirrored():
    phantom = make_phantom(3, (48, 64, 64))
    spacing = phantom.spacing_mm

    def centre(name, view):
        picture = line_integrals(torch.from_numpy(phantom.labels == LABELS[name]).float(), spacing, view)
        total = picture.sum()
        rows, columns = (torch.arange(n).float() for n in picture.shape)
        return float((picture.sum(1) * rows).sum() / total), float((picture.sum(0) * columns).sum() / total)

    lung_r, lung_l, liver, heart = (
        centre(n, "frontal") for n in ("lung_right", "lung_left", "liver", "left_ventricle")
    )
    middle = (phantom.hu.shape[2] - 1) / 2
    assert lung_r[1] < middle < lung_l[1], "the patient's left lung is on the viewer's right"
    assert liver[1] < middle < heart[1], "liver on the viewer's left, heart apex on the viewer's right"
    assert liver[0] > max(lung_r[0], lung_l[0]), "liver below the lungs: head up"
    spine, sternum = centre("spine", "lateral"), centre("sternum", "lateral")
    assert sternum[1] < spine[1], "chest on the left of a lateral picture"
    assert centre("liver", "lateral")[0] > centre("lung_right", "lateral")[0]


@pytest.mark.parametrize("view", VIEWS)
def test_the_stand_is_as_described(view):
    isocentre = np.array([10.0, -20.0, 300.0])
    geometry = cone_geometry(view, isocentre, (300, 400), 0.8)
    assert geometry.source_detector_mm == pytest.approx(1800)
    assert geometry.pixel_spacing_mm == pytest.approx((0.8, 0.8))
    assert geometry.project(isocentre) == pytest.approx((149.5, 199.5))
    # the cone magnifies by about 10 %: 100 mm at the isocentre are 110 mm on the detector
    assert geometry.magnification(isocentre) == pytest.approx(1800 / 1630)
    up, left, back = np.array([0, 0, 1.0]), np.array([-1.0, 0, 0]), np.array([0, -1.0, 0])
    assert geometry.project(isocentre + 100 * up)[0] == pytest.approx(149.5 - 100 * 1800 / 1630 / 0.8)
    across = left if view == "frontal" else back
    assert geometry.project(isocentre + 100 * across)[1] == pytest.approx(199.5 + 100 * 1800 / 1630 / 0.8)
    # along the beam: nearer to the detector is smaller
    beam = -back if view == "frontal" else left
    assert geometry.magnification(isocentre + 100 * beam) < geometry.magnification(isocentre - 100 * beam)


def test_lines_of_the_detector_can_be_cut():
    geometry = cone_geometry("frontal", (0, 0, 0), (10, 12), 2.0)
    cut = geometry.rows(3, 8)
    assert cut.shape == (5, 12)
    np.testing.assert_allclose(cut.pixel_mm(0, 4), geometry.pixel_mm(3, 4))
    assert cut.source_detector_mm == pytest.approx(geometry.source_detector_mm)


@settings(max_examples=60, deadline=None)
@given(
    view=st.sampled_from(VIEWS),
    row=st.floats(-5, 70),
    column=st.floats(-5, 90),
    share=st.floats(0.3, 1.0),
    isocentre=st.tuples(*[st.floats(-500, 500)] * 3),
)
def test_a_point_on_a_ray_is_projected_onto_its_pixel(view, row, column, share, isocentre):
    geometry = cone_geometry(view, isocentre, (64, 80), 5.0)
    ray = ray_of_pixel(geometry, row, column)
    assert np.linalg.norm(ray.direction) == pytest.approx(1)
    np.testing.assert_allclose(geometry.project(ray.at(share * ray.length_mm)), (row, column), atol=1e-6)


def test_all_rays_are_the_single_ones():
    geometry = cone_geometry("lateral", (1, 2, 3), (5, 7), 40.0)
    origin, directions = rays(geometry)
    assert directions.shape == (5, 7, 3)
    ray = ray_of_pixel(geometry, 4, 1)
    np.testing.assert_array_equal(origin, ray.origin_mm)
    np.testing.assert_allclose(directions[4, 1], ray.direction)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), view=st.sampled_from(VIEWS))
def test_a_ray_is_followed_to_a_planted_voxel(seed, view):
    """From any voxel of an oblique volume to its pixel, and back along the ray to that voxel."""
    rng = np.random.default_rng(seed)
    shape = (30, 40, 50)
    affine = affine_of(shape, (2.0, 1.5, 1.5))
    angle = rng.uniform(-0.3, 0.3)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    affine = turn @ affine
    geometry = cone_geometry(view, (0, 0, 0), (128, 128), 2.0)
    voxel = rng.integers(0, shape)
    row, column = geometry.project(voxel_to_world(voxel, affine))
    indices, distances = voxels_on_ray(ray_of_pixel(geometry, row, column), affine, shape, step_mm=0.25)
    assert np.abs(indices - voxel).max(axis=1).min() < 0.25
    assert (indices >= -0.5 - 1e-9).all()
    assert (indices <= np.array(shape) - 0.5 + 1e-9).all()
    assert (np.diff(distances) > 0).all()


def test_a_ray_is_not_an_axis():
    shape, spacing = (40, 40, 40), (5.0, 5.0, 5.0)
    geometry = cone_geometry("frontal", (0, 0, 0), (64, 64), 4.0)
    indices, _ = voxels_on_ray(ray_of_pixel(geometry, 31.5, 50.0), affine_of(shape, spacing), shape)
    # it enters at the back (large h) and drifts outwards (to larger w) on its way to the front
    assert indices[0, 1] > indices[-1, 1]
    assert indices[-1, 2] - indices[0, 2] > 1.5


def test_a_ray_that_misses_meets_nothing():
    shape = (10, 10, 10)
    geometry = cone_geometry("frontal", (0, 0, 0), (64, 64), 10.0)
    indices, distances = voxels_on_ray(ray_of_pixel(geometry, 0, 0), affine_of(shape, (1, 1, 1)), shape)
    assert indices.shape == (0, 3)
    assert distances.shape == (0,)


def test_the_path_length_through_a_slab_is_that_of_the_ray():
    shape = (200, 50, 200)
    affine = affine_of(shape, (2.0, 2.0, 2.0))
    geometry = cone_geometry("frontal", (0, 0, 0), (3, 3), 100.0)
    for pixel in ((1, 1), (0, 1), (2, 2)):
        ray = ray_of_pixel(geometry, *pixel)
        _, distances = voxels_on_ray(ray, affine, shape, step_mm=0.1)
        assert len(distances) * 0.1 == pytest.approx(100.0 / ray.direction[1], abs=0.2)


def test_world_and_voxels_are_inverse():
    affine = affine_of((7, 8, 9), (2.5, 0.7, 0.8))
    points = np.random.default_rng(0).normal(size=(5, 2, 3))
    np.testing.assert_allclose(voxel_to_world(world_to_voxel(points, affine), affine), points, atol=1e-12)


def test_geometry_survives_json():
    geometry = cone_geometry("lateral", (0.1, -7 / 3, 1e3), (30, 40), 0.839)
    back = ConeGeometry.from_dict(json.loads(json.dumps(geometry.as_dict())))
    assert (back.view, back.shape) == (geometry.view, geometry.shape)
    for name in ("source_mm", "first_pixel_mm", "row_step_mm", "column_step_mm"):
        np.testing.assert_array_equal(getattr(back, name), getattr(geometry, name))


@pytest.mark.parametrize(
    "damage",
    [
        {"format": "else"}, {"view": "oblique"}, {"shape": [0, 3]}, {"shape": 3}, {"source_mm": [0, 0]},
        {"source_mm": "x"}, {"row_step_mm": [0, 0, 0]}, {"column_step_mm": [0.0, float("nan"), 1]}, {"shape": None},
    ],
)  # fmt: skip
def test_damaged_geometry_is_refused(damage):
    values = {**cone_geometry("frontal", (0, 0, 0), (4, 4), 1.0).as_dict(), **damage}
    with pytest.raises(InputError):
        ConeGeometry.from_dict(values)
    with pytest.raises(InputError):
        ConeGeometry.from_dict({key: value for key, value in values.items() if key != "view"})
