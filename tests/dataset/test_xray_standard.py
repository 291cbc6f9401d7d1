"""Borders, size and histogram of radiographs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance

from dataset.projection import cone_geometry, project_parallel
from dataset.volume_io import read_nifti
from dataset.xray import load_xray
from dataset.xray_decode import decode_xray
from dataset.xray_drr import read_info, read_line_integrals, sidecar_of, write_drr
from dataset.xray_standard import STANDARD_LANDMARKS, content_box, fit_square, landmarks, pad_square, standardise
from errors import InputError
from tests.dataset.xray_factory import eight_bit, radiograph
from tests.helpers import REAL_DATA

needs_real_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the real data of ../shared/data are not here")


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), levels=st.sampled_from([2, 3, 17, 256, 65536]), gamma=st.floats(0.2, 5))
def test_standardisation_is_monotone_and_stays_in_0_1(seed, levels, gamma):
    rng = np.random.default_rng(seed)
    pixels = np.floor(rng.random((40, 50)) ** gamma * levels).astype(np.float32)
    pixels[0, 0], pixels[0, 1] = 0, levels
    standard = standardise(pixels)
    order = np.argsort(pixels, axis=None, kind="stable")
    assert (np.diff(standard.ravel()[order]) >= 0).all()
    assert standard.min() >= 0
    assert standard.max() <= 1
    assert standard.dtype == np.float32


def test_standardisation_keeps_different_greys_apart():
    pixels = eight_bit().astype(np.float32)
    standard = standardise(pixels)
    assert len(np.unique(standard)) == len(np.unique(pixels))


def test_percentiles_go_where_they_belong():
    np.testing.assert_allclose(landmarks(standardise(radiograph().astype(np.float32))), STANDARD_LANDMARKS, atol=1e-3)


@settings(max_examples=20, deadline=None)
@given(slope=st.floats(1e-3, 1e3), intercept=st.floats(-1e3, 1e3))
def test_brightness_and_contrast_of_the_source_do_not_matter(slope, intercept):
    pixels = radiograph().astype(np.float64)[::3, ::3] / 65535
    np.testing.assert_allclose(standardise(slope * pixels + intercept), standardise(pixels), atol=1e-3)


def test_a_tone_curve_of_a_vendor_hardly_matters():
    pixels = radiograph().astype(np.float32) / 65535
    assert np.abs(standardise(pixels**0.6) - standardise(pixels)).mean() < 0.01
    assert np.abs(pixels**0.6 - pixels).mean() > 0.1


def test_the_standard_scale_is_increasing():
    assert (np.diff(STANDARD_LANDMARKS) > 0).all()
    assert 0 < STANDARD_LANDMARKS[0] < STANDARD_LANDMARKS[-1] < 1


@settings(max_examples=30, deadline=None)
@given(borders=st.tuples(*[st.integers(0, 40)] * 4), value=st.sampled_from([0, 65535]))
def test_borders_come_off_and_nothing_else(borders, value):
    top, bottom, left, right = borders
    inner = radiograph()[30:-10, 40:-40].astype(np.float32)  # no air beside the body, whose box is its own
    box = content_box(inner)
    assert box == (0, inner.shape[0], 0, inner.shape[1])
    pixels = np.pad(inner, ((top, bottom), (left, right)), constant_values=value)
    assert content_box(pixels) == (top, top + inner.shape[0], left, left + inner.shape[1])


def test_a_marker_in_the_border_does_not_hold_it():
    inner = radiograph()[30:-10, 40:-40].astype(np.float32)
    pixels = np.pad(inner, 30)
    pixels[10:13, 12:14] = 65535  # a letter in the shutter
    assert content_box(pixels) == (30, 30 + inner.shape[0], 30, 30 + inner.shape[1])


def test_a_padded_picture_is_the_same_tensor(tmp_path):
    from PIL import Image

    Image.fromarray(radiograph()).save(tmp_path / "a.png")
    wide = np.pad(radiograph(), ((0, 0), (20, 20)))
    Image.fromarray(wide).save(tmp_path / "b.png")
    a, b = load_xray(tmp_path / "a.png", 110), load_xray(tmp_path / "b.png", 110)
    assert float((a.image - b.image).abs().mean()) < 0.002
    assert any("borders off" in note for note in b.notes)


def test_nothing_but_borders_is_refused():
    pixels = np.zeros((100, 100), np.float32)
    pixels[40:50, 40:50] = np.random.default_rng(0).random((10, 10))
    with pytest.raises(InputError, match="borders"):
        content_box(pixels)


@settings(max_examples=40, deadline=None)
@given(height=st.integers(32, 300), width=st.integers(32, 300), size=st.integers(16, 200))
def test_the_aspect_ratio_is_kept_and_pixels_can_be_followed(height, width, size):
    pixels = np.add.outer(np.arange(height) * 2.0, np.arange(width) * 1.0)
    content, placement = fit_square(pixels, size, (0, height, 0, width))
    assert max(content.shape) == size
    for length, scale in zip((height, width), placement.scale, strict=True):
        # rounding to whole pixels is all that distorts
        assert abs(length / scale - length * size / max(height, width)) <= 0.5 + 1e-9
    image = pad_square(content, size, placement)
    # the ramp shows where each pixel comes from
    row, column = placement.pad[0] + content.shape[0] // 2, placement.pad[1] + content.shape[1] // 2
    at_row, at_column = placement.file_pixel(row, column)
    reach = 2 * max(placement.scale) + 1
    if reach < min(at_row, at_column, height - 1 - at_row, width - 1 - at_column):
        assert image[row, column] == pytest.approx(2 * at_row + at_column, abs=0.15 * max(placement.scale))
    assert placement.standard_pixel(at_row, at_column) == pytest.approx((row, column))


def test_shrinking_does_not_alias():
    stripes = np.tile(np.array([0, 1], np.float32), (512, 256))
    content, _ = fit_square(stripes, 64, (0, 512, 0, 512))
    assert np.abs(content[:, 2:-2] - 0.5).max() < 0.1


def test_drr_files_keep_integrals_and_geometry(tmp_path):
    rng = np.random.default_rng(0)
    integrals = rng.random((40, 60)) * 12
    integrals[0, 0] = 20.0  # beyond the range
    geometry = cone_geometry("lateral", (1, 2, 3), (40, 60), 0.8)
    affine = np.diag([2.0, -1.0, -1.0, 1.0])[[2, 1, 0, 3]]
    picture = tmp_path / "a_lateral.png"
    assert write_drr(picture, integrals, geometry, affine, (5, 6, 7), {"source": "x"}) == 1
    first = picture.read_bytes(), sidecar_of(picture).read_bytes()
    back, info = read_line_integrals(picture)
    np.testing.assert_allclose(back[1:], integrals[1:], atol=0.5001 / 4000)
    np.testing.assert_array_equal(info.affine, affine)
    assert (info.shape_dhw, info.geometry.view) == ((5, 6, 7), "lateral")
    write_drr(picture, integrals, geometry, affine, (5, 6, 7), {"source": "x"})
    assert (picture.read_bytes(), sidecar_of(picture).read_bytes()) == first

    xray = load_xray(picture, 30)
    assert xray.view == "lateral"
    assert xray.pixel_spacing_mm == pytest.approx([0.8 * scale for scale in xray.placement.scale])
    with pytest.raises(InputError, match="a lateral radiograph"):
        load_xray(picture, view="frontal")


def test_damaged_drr_files_are_refused(tmp_path):
    picture = tmp_path / "a.png"
    geometry = cone_geometry("frontal", (1, 2, 3), (40, 60), 0.8)
    write_drr(picture, np.random.default_rng(0).random((40, 60)), geometry, np.eye(4), (5, 6, 7), {})
    sound = json.loads(sidecar_of(picture).read_text())
    for damage in ({"geometry": {}}, {"volume": 3}, {"volume": {"affine_ras_mm": [[1]], "shape_dhw": [1, 2, 3]}}):
        sidecar_of(picture).write_text(json.dumps({**sound, **damage}))
        with pytest.raises(InputError, match=r"a\.json: "):
            load_xray(picture)
    sidecar_of(picture).write_text("{")
    with pytest.raises(InputError, match=r"a\.json"):
        load_xray(picture)
    sidecar_of(picture).write_text('{"somebody": "else"}')
    assert read_info(picture) is None
    with pytest.raises(InputError, match=r"a\.png"):
        read_line_integrals(picture)
    sidecar_of(picture).write_text(
        json.dumps({**sound, "geometry": cone_geometry("frontal", (0, 0, 0), (9, 9), 1.0).as_dict()})
    )
    with pytest.raises(InputError, match="size does not fit"):
        load_xray(picture)


def histogram_distance(ours, theirs):
    """Mean earth mover's distance of each picture of one kind to all pixels of the other."""
    pool = np.concatenate([picture.ravel() for picture in theirs])[::7]
    return np.mean([wasserstein_distance(picture.ravel()[::7], pool) for picture in ours])


@needs_real_data
def test_histograms_of_real_and_rendered_radiographs_get_closer():
    real, drr = [], []
    for path in sorted((REAL_DATA / "xray" / "frontal").glob("*.png"))[::2]:
        pixels = decode_xray(path).pixels
        real.append(fit_square(pixels, 128, content_box(pixels))[0])
    for path in sorted((REAL_DATA / "ct_2mm").glob("*.nii.gz"))[:4]:
        volume = read_nifti(path)
        pixels = project_parallel(torch.from_numpy(volume.hu.astype(np.float32)), volume.spacing_mm).numpy()
        drr.append(fit_square(pixels, 128, content_box(pixels))[0])
    raw_real, raw_drr = ([(p - p.min()) / np.ptp(p) for p in pictures] for pictures in (real, drr))
    new_real, new_drr = ([standardise(p) for p in pictures] for pictures in (real, drr))
    before, after = histogram_distance(raw_drr, raw_real), histogram_distance(new_drr, new_real)
    assert after < 0.7 * before
    # and real ones of different make get closer to each other
    assert histogram_distance(new_real, new_real) < 0.5 * histogram_distance(raw_real, raw_real)
