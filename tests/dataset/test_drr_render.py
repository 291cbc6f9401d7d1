"""Radiographs rendered from CT: physics, geometry and sides."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from dataset.body import Body
from dataset.drr_render import Stand, fit_geometry, render
from dataset.phantom import LABELS, affine_of, make_phantom
from dataset.projection import VIEWS, cone_geometry, project_parallel, ray_of_pixel, voxel_to_world, voxels_on_ray
from errors import ConfigurationError
from params import MU_WATER_PER_MM


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
