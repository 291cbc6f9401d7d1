"""Every effect changes what it says, and none of them mirrors."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from dataset.xray_augment import (
    XRayAugmentation,
    add_borders,
    add_noise,
    augment_xray,
    augmentation_generator,
    blur,
    change_contrast,
    change_gamma,
    rotate_and_scale,
)
from errors import ConfigurationError
from tests.dataset.xray_factory import radiograph

OFF = XRayAugmentation(**{field.name: 0.0 for field in fields(XRayAugmentation)})


@pytest.fixture(scope="module")
def image():
    picture = np.zeros((1, 224, 224), np.float32)
    picture[0, 2:222, 22:202] = radiograph() / np.float32(65535)
    return torch.from_numpy(picture)


def only(**strengths):
    return XRayAugmentation(**{**vars(OFF), **strengths})


def test_contrast_stretches_about_the_middle():
    ramp = np.linspace(0, 1, 11, dtype=np.float32)[None]
    stretched = change_contrast(ramp, 1.5)
    assert stretched[0, 5] == pytest.approx(0.5)
    assert stretched[0, 6] == pytest.approx(0.65)
    assert change_contrast(ramp, 1.0, 0.1)[0, 3] == pytest.approx(0.4)
    assert (stretched.min(), stretched.max()) == (0, 1)


def test_gamma_bends_the_middle_only():
    ramp = np.array([[0, 0.25, 1]], np.float32)
    np.testing.assert_allclose(change_gamma(ramp, 2.0), [[0, 0.0625, 1]])
    np.testing.assert_allclose(change_gamma(ramp, 0.5), [[0, 0.5, 1]])


def test_blur_has_its_sigma():
    point = np.zeros((65, 65), np.float32)
    point[32, 32] = 1
    spread = blur(point, 3.0)
    rows = np.arange(65) - 32
    assert spread.sum() == pytest.approx(1, abs=1e-3)
    assert np.sqrt((spread.sum(1) * rows**2).sum()) == pytest.approx(3, rel=0.02)
    assert blur(point, 0) is point


def test_noise_has_its_deviation_and_no_bias():
    flat = np.full((300, 300), 0.5, np.float32)
    noisy = add_noise(flat, 0.04, augmentation_generator(0, 0, 0))
    assert noisy.std() == pytest.approx(0.03, rel=0.03)
    assert noisy.mean() == pytest.approx(0.5, abs=1e-3)
    assert add_noise(flat, 0.0, augmentation_generator(0, 0, 0)) == pytest.approx(flat)


def test_borders_are_black_and_the_rest_is_untouched():
    white = np.ones((100, 200), np.float32)
    shown = add_borders(white, (0.1, 0.2, 0.05, 0.0))
    assert shown[10:80, 10:].all()
    assert shown.sum() == 70 * 190
    assert white.all()


def test_rotation_is_counter_clockwise_about_the_middle():
    picture = np.zeros((101, 101), np.float32)
    picture[50, 90] = 1  # to the right of the middle
    turned = rotate_and_scale(picture, 90, 1.0)
    assert np.unravel_index(turned.argmax(), turned.shape) == (10, 50)  # now above it


def test_scale_magnifies_and_shift_moves():
    picture = np.zeros((101, 101), np.float32)
    picture[49:52, 69:72] = 1
    large = rotate_and_scale(picture, 0, 1.5)
    assert np.allclose(ndimage.center_of_mass(large), (50, 80), atol=0.2)
    assert large.sum() == pytest.approx(9 * 1.5**2, rel=0.1)
    moved = rotate_and_scale(picture, 0, 1.0, (5, -10))
    assert np.allclose(ndimage.center_of_mass(moved), (55, 60), atol=0.01)


def augmented(image, generator, settings=None):
    """The picture alone."""
    return augment_xray(image, torch.zeros(1, 2), generator, settings)[0]


def test_all_off_changes_nothing(image):
    rays = 2 * torch.rand(3, 4, 5, 2) - 1
    result, same = augment_xray(image, rays, augmentation_generator(1, 2, 3), OFF)
    torch.testing.assert_close(result, image, atol=1e-6, rtol=0)
    torch.testing.assert_close(same, rays)


def test_rays_move_with_their_picture():
    """Whatever a cell saw before, it sees afterwards: beads of different brightness, one for each ray."""
    moving = only(rotation_deg=20.0, scale=0.3, shift=0.08)
    x, y = torch.tensor([-0.4, 0.0, 0.35]), torch.tensor([-0.3, 0.2, 0.1])
    rays = torch.stack([x, y], dim=1)  # (3, 2)
    side = 201
    rows, columns = np.mgrid[:side, :side]
    image = np.zeros((side, side), np.float32)
    for number, (px, py) in enumerate(rays.tolist()):
        column, row = ((place + 1) * side / 2 - 0.5 for place in (px, py))
        image += (0.3 + 0.3 * number) * np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * 5.0**2))
    picture = torch.from_numpy(image)[None]

    def seen(image, rays):
        return F.grid_sample(image[None], rays[None, None], align_corners=False)[0, 0, 0]  # (3,)

    torch.testing.assert_close(seen(picture, rays), torch.tensor([0.3, 0.6, 0.9]), atol=0.02, rtol=0)
    lost = []
    for index in range(20):
        moved, along = augment_xray(picture, rays, augmentation_generator(3, 0, index), moving)
        torch.testing.assert_close(seen(moved, along), seen(picture, rays), atol=0.03, rtol=0)
        lost.append(float((seen(moved, rays) - seen(picture, rays)).abs().max()))
    assert max(lost) > 0.3  # rays that stayed where they were would miss their beads


@pytest.mark.parametrize("name", [field.name for field in fields(XRayAugmentation)])
def test_each_strength_alone_changes_something(name, image):
    settings, changes = only(**{name: getattr(XRayAugmentation(), name)}), []
    for index in range(10):
        result = augmented(image, augmentation_generator(0, 0, index), settings)
        changes.append(float((result - image).abs().max()))
        assert result.shape == image.shape
        assert result.dtype == torch.float32
        assert float(result.min()) >= 0
        assert float(result.max()) <= 1
    # a draw may be near nothing, ten are not
    assert max(changes) > 0.02
    assert len(set(changes)) > 5


def test_the_same_key_gives_the_same_picture(image):
    one, again = (augmented(image, augmentation_generator(7, 3, 11)) for _ in range(2))
    assert torch.equal(one, again)
    for key in ((8, 3, 11), (7, 4, 11), (7, 3, 12)):
        assert not torch.equal(one, augmented(image, augmentation_generator(*key)))


def test_the_original_is_not_touched(image):
    before = image.clone()
    augmented(image, augmentation_generator(0, 0, 0))
    assert torch.equal(image, before)


def test_nothing_ever_mirrors():
    """A marker in the upper left quarter stays there, also at the greatest strengths that are sensible."""
    strong = XRayAugmentation(contrast=0.6, gamma=0.6, blur=8.0, noise=0.02, border=0.1, rotation_deg=15, scale=0.2)
    marked = np.zeros((1, 224, 224), np.float32)
    marked[0, 50:80, 60:84] = 1.0
    for settings in (XRayAugmentation(), strong):
        for index in range(40):
            result = augmented(torch.from_numpy(marked), augmentation_generator(5, 0, index), settings)[0].numpy()
            bright = result > 0.5 * (result.max() + np.median(result))
            row, column = ndimage.center_of_mass(bright)
            assert row < 100
            assert column < 105
            # upright as well: it is taller than wide, and would not be after a quarter turn
            rows, columns = np.nonzero(bright)
            assert rows.std() > columns.std()


def test_nonsense_is_refused():
    for settings in ({"noise": -1.0}, {"gamma": float("nan")}, {"border": 0.5}, {"rotation_deg": 90.0}):
        with pytest.raises(ConfigurationError, match=next(iter(settings))):
            XRayAugmentation(**settings)
