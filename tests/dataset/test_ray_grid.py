"""Where cells of the latent are seen: against pictures of dense balls, rendered and read as any radiograph."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dataset.body import isolate_body
from dataset.drr_render import Stand, fit_geometry, render
from dataset.geometry import spacing_mm
from dataset.phantom import affine_of
from dataset.projection import beam_direction, project_parallel, voxel_to_world
from dataset.ray_grid import latent_affine, latent_shape, ray_grid
from dataset.xray import load_xray
from dataset.xray_drr import write_drr
from errors import ConfigurationError

VIEWS = ("frontal", "lateral")
SHAPE, SPACING, STRIDE = (32, 48, 48), (8.0, 6.0, 6.5), (2, 4, 4)
SIZE, COLUMNS = 128, 128


def thorax(affine, ball_mm=None, radius_mm=11.0):
    """An elliptic cylinder of water in air with a hollow, and a ball far denser than bone."""
    d, h, w = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in SHAPE), indexing="ij")
    body = (h * SPACING[1] / 100) ** 2 + (w * SPACING[2] / 140) ** 2 < 1
    hu = np.where(body, 0, -1000).astype(np.int16)
    hu[(h * SPACING[1] / 50) ** 2 + ((np.abs(w) * SPACING[2] - 70) / 40) ** 2 + (d * SPACING[0] / 90) ** 2 < 1] = -850
    if ball_mm is not None:
        world = voxel_to_world(np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1), affine)
        hu[np.linalg.norm(world - ball_mm, axis=-1) < radius_mm] = 20000
    return hu


def oblique():
    """A volume that lies askew in the world, off its origin."""
    turn = np.eye(4)
    turn[:3, :3] = [[0.995, -0.0998749, 0], [0.0998749, 0.995, 0], [0, 0, 1]]
    affine = turn @ affine_of(SHAPE, SPACING)
    affine[:3, 3] += (20, -40, 700)
    return affine


def place_of(picture):
    """(x, y) in [-1, 1] of the ball: it is far brighter than anything else, which is below the 99.5th percentile."""
    spot = np.maximum(picture - 0.97, 0)
    rows, columns = np.meshgrid(*map(np.arange, spot.shape), indexing="ij")
    row, column = (float((spot * index).sum() / spot.sum()) for index in (rows, columns))
    return (2 * column + 1) / spot.shape[1] - 1, (2 * row + 1) / spot.shape[0] - 1


def read_picture(path, integrals, geometry, affine):
    """A picture in a file, read as the data module would."""
    write_drr(path, integrals, geometry, affine, SHAPE, {"source": "x"})
    return load_xray(path, SIZE, view=geometry.view)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("cell", [(3, 4, 8), (12, 8, 3), (8, 6, 5)])
def test_a_ball_is_seen_where_its_cell_is_projected(view, cell, tmp_path):
    affine = oblique()
    ball_mm = voxel_to_world(np.array(cell), latent_affine(affine, STRIDE))
    body = isolate_body(thorax(affine, ball_mm), affine)
    geometry, _ = fit_geometry(body, affine, Stand(columns=COLUMNS), view)
    integrals = render(body, affine, geometry)
    xray = read_picture(tmp_path / "a.png", integrals, geometry, affine)
    grid = ray_grid(geometry, view, xray, affine, SHAPE, STRIDE)
    assert grid.shape == (16, 12, 12, 2)
    assert grid.dtype == np.float32
    # nothing in the body is as bright as the ball
    picture = xray.image[0].numpy()
    found = place_of(picture)
    one_pixel = 2 / SIZE
    np.testing.assert_allclose(grid[cell], found, atol=0.75 * one_pixel)
    # and no other cell of its slice is claimed to be there but those on its ray
    apart = np.abs(grid[cell[0]] - grid[cell]).max(axis=-1)
    same_ray = np.argwhere(apart < 3 * one_pixel)
    across = 1 if view == "frontal" else 0
    assert (np.abs(same_ray[:, across] - cell[1:][across]) <= 1).all()


@pytest.mark.parametrize("view", VIEWS)
def test_what_is_nearer_to_the_source_is_magnified_more(view, tmp_path):
    affine = affine_of(SHAPE, SPACING)
    body = isolate_body(thorax(affine), affine)
    geometry, _ = fit_geometry(body, affine, Stand(columns=COLUMNS), view)
    xray = read_picture(tmp_path / "a.png", render(body, affine, geometry), geometry, affine)
    grid = ray_grid(geometry, view, xray, affine, SHAPE, STRIDE)
    # one row of cells across the beam, at the side of the source and at that of the detector
    planes = (grid[8, 10], grid[8, 1]) if view == "frontal" else (grid[8, :, 1], grid[8, :, 10])
    near, far = (float(np.ptp(plane[2:10, 0])) for plane in planes)
    points = voxel_to_world(np.array([[8, 10, 6], [8, 1, 6]]), latent_affine(affine, STRIDE))
    if view == "lateral":
        points = voxel_to_world(np.array([[8, 6, 1], [8, 6, 10]]), latent_affine(affine, STRIDE))
    depths = (points - geometry.source_mm) @ beam_direction(view)
    assert depths[0] < depths[1]
    assert near / far == pytest.approx(depths[1] / depths[0], rel=1e-5)
    assert near / far > 1.1


def test_the_patients_left_is_on_the_right_and_the_chest_of_a_lateral_picture_on_the_left(tmp_path):
    affine = affine_of(SHAPE, SPACING)
    left_mm = np.array([-80.0, 0.0, 0.0])  # RAS+: -x is the patient's left
    front_mm = np.array([0.0, 60.0, 40.0])
    for view, ball_mm, side in (("frontal", left_mm, 1), ("lateral", front_mm, -1)):
        body = isolate_body(thorax(affine, ball_mm), affine)
        geometry, _ = fit_geometry(body, affine, Stand(columns=COLUMNS), view)
        xray = read_picture(tmp_path / f"{view}.png", render(body, affine, geometry), geometry, affine)
        picture = xray.image[0].numpy()
        x, y = place_of(picture)
        assert x * side > 0.2
        grid = ray_grid(geometry, view, xray, affine, SHAPE, (1, 1, 1))
        voxel = np.rint((ball_mm - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T).astype(int)
        assert np.abs(grid[tuple(voxel)] - (x, y)).max() < 0.05
        assert np.abs(grid[tuple(voxel)] * (-1, 1) - (x, y)).max() > 0.4  # mirrored it would not fit


@pytest.mark.parametrize("view", VIEWS)
def test_without_a_geometry_rays_run_along_the_axis(view, tmp_path):
    """A parallel projection of the whole field, saved as a PNG that says nothing of itself."""
    affine = affine_of(SHAPE, (6.5, 6.5, 6.5))
    spots = []
    for voxel in ((8, 16, 31), (24, 33, 12)):
        hu = np.random.default_rng(0).integers(-900, 0, SHAPE).astype(np.int16)  # no border to take off
        hu[voxel] = 30000
        integrals = project_parallel(torch.from_numpy(hu), (6.5, 6.5, 6.5), view).numpy()
        Image.fromarray(np.rint(integrals / integrals.max() * 65535).astype(np.uint16)).save(tmp_path / "a.png")
        xray = load_xray(tmp_path / "a.png", SIZE)
        grid = ray_grid(None, view, xray, affine, SHAPE, (1, 1, 1))
        picture = xray.image[0].numpy()
        spots.append((grid[voxel], place_of(picture)))
    for predicted, found in spots:
        np.testing.assert_allclose(predicted, found, atol=2 / SIZE)


@settings(max_examples=30, deadline=None)
@given(
    tall=st.integers(60, 200),
    wide=st.integers(60, 200),
    spacing=st.tuples(*[st.floats(0.5, 10)] * 3),
    view=st.sampled_from(VIEWS),
)
def test_a_real_radiograph_covers_the_field_at_one_scale(tmp_path_factory, tall, wide, spacing, view):
    path = tmp_path_factory.getbasetemp() / "cover.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (tall, wide)).astype(np.uint8)).save(path)
    xray = load_xray(path, 128)
    affine = affine_of(SHAPE, spacing)
    grid = ray_grid(None, view, xray, affine, SHAPE, (1, 1, 1))
    across = grid[:, 0, :] if view == "frontal" else grid[:, :, 0]
    column_mm = spacing_mm(affine)[2 if view == "frontal" else 1]
    right, down = across[0, 1, 0] - across[0, 0, 0], across[0, 0, 1] - across[1, 0, 1]
    assert right > 0
    assert down > 0  # d runs to the head, which is up
    assert right / column_mm == pytest.approx(down / spacing_mm(affine)[0], rel=1e-3)
    content = [1 - 2 * pad / 128 for pad in xray.placement.pad]  # half of its height and width
    assert np.abs(across[..., 1]).max() <= content[0]
    assert np.abs(across[..., 0]).max() <= content[1]
    half = across[..., 1].max() + down / 2, across[..., 0].max() + right / 2
    assert max(a / b for a, b in zip(half, content, strict=True)) == pytest.approx(1, abs=1e-3)


def test_a_known_spacing_decides_the_size(tmp_path):
    """A detector of 0.5 mm pixels: 2 mm of patient, magnified by 1.1, take 4.4 of them."""
    from dataclasses import replace

    Image.fromarray(np.random.default_rng(1).integers(0, 255, (300, 300)).astype(np.uint8)).save(tmp_path / "a.png")
    xray = replace(load_xray(tmp_path / "a.png", 300), pixel_spacing_mm=(0.5, 0.5))
    grid = ray_grid(None, "frontal", xray, affine_of((10, 10, 10), (2.0, 2.0, 2.0)), (10, 10, 10), (1, 1, 1))
    assert (grid[0, 0, 1, 0] - grid[0, 0, 0, 0]) * 150 == pytest.approx(2 / 0.5 * 1800 / 1630, rel=1e-4)
    np.testing.assert_allclose(grid.mean(axis=(0, 1, 2)), 0, atol=1e-6)  # middle upon middle


@settings(max_examples=30, deadline=None)
@given(
    stride=st.tuples(*[st.integers(1, 6)] * 3),
    cell=st.tuples(*[st.integers(0, 5)] * 3),
    shift=st.tuples(*[st.floats(-500, 500)] * 3),
)
def test_a_cell_is_the_middle_of_its_voxels(stride, cell, shift):
    affine = oblique()
    affine[:3, 3] += shift
    block = np.stack(np.meshgrid(*(np.arange(n) for n in stride), indexing="ij"), axis=-1) + np.multiply(cell, stride)
    middle = voxel_to_world(block.reshape(-1, 3), affine).mean(axis=0)
    np.testing.assert_allclose(voxel_to_world(np.array(cell), latent_affine(affine, stride)), middle, atol=1e-9)


def test_cells_behind_the_source_are_outside_and_finite(tmp_path):
    affine = affine_of(SHAPE, SPACING)
    body = isolate_body(thorax(affine), affine)
    geometry, _ = fit_geometry(body, affine, Stand(columns=64), "frontal")
    xray = read_picture(tmp_path / "a.png", render(body, affine, geometry), geometry, affine)
    long = ray_grid(geometry, "frontal", xray, affine, (8, 1200, 8), (4, 4, 4))  # 7 m of air behind the patient
    assert np.isfinite(long).all()
    assert np.abs(long).max() <= 3
    behind = voxel_to_world(np.array([1, 299, 1]), latent_affine(affine, (4, 4, 4)))
    assert (behind - geometry.source_mm) @ geometry.normal < 0
    assert np.abs(long[1, 299, 1]).max() > 1


def test_a_size_that_is_no_multiple_is_padded_at_the_far_end():
    assert latent_shape((5, 8, 9), (2, 4, 4)) == (3, 2, 3)


def test_wrong_views_and_strides_are_refused(tmp_path):
    affine = affine_of(SHAPE, SPACING)
    body = isolate_body(thorax(affine), affine)
    geometry, _ = fit_geometry(body, affine, Stand(columns=64), "frontal")
    xray = read_picture(tmp_path / "a.png", render(body, affine, geometry), geometry, affine)
    with pytest.raises(ConfigurationError, match="frontal picture, a lateral one"):
        ray_grid(geometry, "lateral", xray, affine, SHAPE, STRIDE)
    with pytest.raises(ConfigurationError, match="stride"):
        ray_grid(geometry, "frontal", xray, affine, SHAPE, (0, 4, 4))
