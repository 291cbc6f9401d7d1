"""The encoder of radiographs, its scales, and lifting in numbers that are known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm.xray_encoder import XRayEncoder, coarser_grid, cumulative_strides, lift, pad_grid, scale_of_level
from errors import ConfigurationError


def test_maps_have_the_resolutions_that_were_asked_for():
    encoder = XRayEncoder((4, 6, 8), n_views=2, finest=1)
    maps = encoder(torch.rand(3, 1, 32, 48), torch.tensor([0, 1, 0]))
    assert maps[0] is None
    assert [tuple(m.shape) for m in maps[1:]] == [(3, 6, 8, 12), (3, 8, 4, 6)]
    with pytest.raises(ConfigurationError, match="finest scale 3"):
        XRayEncoder((4, 6, 8), 1, finest=3)


def test_pictures_do_not_influence_each_other_and_views_differ():
    torch.manual_seed(0)
    encoder = XRayEncoder((4, 8), n_views=2).eval()
    a, b = torch.rand(2, 1, 16, 16)
    together = encoder(torch.stack([a, b]), torch.tensor([0, 0]))
    alone = encoder(a[None], torch.tensor([0]))
    lateral = encoder(a[None], torch.tensor([1]))
    for x, y, z in zip(together, alone, lateral, strict=True):
        torch.testing.assert_close(x[:1], y)
        assert not torch.allclose(y, z)


def test_features_stay_where_they_are_in_the_picture():
    """A change in one corner does not reach the opposite one of the finest map."""
    torch.manual_seed(0)
    encoder = XRayEncoder((4, 4), n_views=1)
    plain = torch.rand(1, 1, 64, 64)
    spot = plain.clone()
    spot[..., :4, :4] += 1
    view = torch.tensor([0])
    change = (encoder(spot, view)[0] - encoder(plain, view)[0]).abs().amax(dim=(0, 1))
    assert change[:2, :2].min() > 0
    assert change[16:, 16:].max() == 0


def test_lifting_interpolates_between_pixel_centres():
    """On a ramp in x and y the answer is the position itself."""
    size = 16
    centres = torch.linspace(-1, 1, 2 * size + 1)[1::2]
    ramp = torch.stack(torch.meshgrid(centres, centres, indexing="ij"))[None].flip(1)  # (1, 2, S, S): x, y
    grid = torch.rand(1, 3, 4, 5, 2) * 1.8 - 0.9
    found, seen = lift(ramp, grid)
    assert found.shape == (1, 2, 3, 4, 5)
    assert (seen == 1).all()
    torch.testing.assert_close(found, grid.movedim(-1, 1), atol=1e-5, rtol=0)


@settings(max_examples=30, deadline=None)
@given(x=st.floats(-3, 3), y=st.floats(-3, 3))
def test_seen_means_inside_the_picture(x, y):
    found, seen = lift(torch.ones(1, 1, 4, 4), torch.tensor([x, y]).reshape(1, 1, 1, 1, 2))
    inside = bool(torch.tensor([x, y]).abs().max() <= 1)
    assert bool(seen) == inside
    # at the edge nothing is blended with the black outside; bilinear weights sum to 1 but for rounding
    assert float(found) == pytest.approx(1, abs=1e-6) if inside else float(found) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_places_keep_their_precision_under_autocast(dtype):
    picture = torch.zeros(1, 1, 256, 256)
    picture[..., 100, 201] = 1
    place = torch.tensor([(2 * 201 + 1) / 256 - 1, (2 * 100 + 1) / 256 - 1]).reshape(1, 1, 1, 1, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        found, _ = lift(picture.to(dtype), place)
    assert float(found) == pytest.approx(1, abs=1e-4)


@settings(max_examples=20, deadline=None)
@given(shape=st.tuples(*[st.integers(1, 9)] * 3), stride=st.tuples(*[st.sampled_from([1, 2, 4])] * 3))
def test_coarser_cells_are_seen_at_the_mean_of_what_they_hold(shape, stride):
    grid = torch.rand(2, *shape, 2)
    padded = pad_grid(grid, stride)
    coarse = coarser_grid(padded, stride)
    d, h, w = (-(-n // s) for n, s in zip(shape, stride, strict=True))
    assert coarse.shape == (2, d, h, w, 2)
    # what is beyond the far end is where the last cell is
    index = [torch.arange(n * s).clamp(max=m - 1) for n, s, m in zip((d, h, w), stride, shape, strict=True)]
    whole = grid[:, index[0]][:, :, index[1]][:, :, :, index[2]]
    expected = whole.reshape(2, d, stride[0], h, stride[1], w, stride[2], 2).mean(dim=(2, 4, 6))
    torch.testing.assert_close(coarse, expected)


def test_levels_read_the_scale_of_their_cells():
    strides = cumulative_strides(((1, 1, 1), (1, 2, 2), (2, 2, 2)))
    assert strides == [(1, 1, 1), (1, 2, 2), (2, 4, 4)]
    # 64 cells across 256 pixels: 4 pixels a cell, which the scale of 1/4 has; then 1/8 and 1/16
    assert [scale_of_level((16, 64, 64), stride, 256, 4) for stride in strides] == [1, 2, 3]
    assert scale_of_level((8, 16, 16), (1, 1, 1), 128, 4) == 2
    assert scale_of_level((64, 64, 64), (1, 1, 1), 64, 4) == 0
    assert scale_of_level((4, 4, 4), (4, 4, 4), 256, 3) == 2
