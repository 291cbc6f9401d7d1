"""Tiles cover every voxel, start on the codec's grid, and stay inside the padded volume."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.tiling import Tiling, crop_slices
from errors import ConfigurationError

LENGTHS = st.tuples(*[st.integers(1, 40)] * 3)


@st.composite
def tilings(draw: st.DrawFn) -> Tiling:
    stride = draw(st.tuples(*[st.integers(1, 4)] * 3))
    tile = tuple(cells * step for cells, step in zip(draw(st.tuples(*[st.integers(1, 8)] * 3)), stride, strict=True))
    return Tiling(draw(LENGTHS), tile, draw(st.floats(0, 0.95)), stride)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=80)
@given(tilings())
def test_every_voxel_is_covered_and_no_tile_reaches_beyond(tiling: Tiling) -> None:
    covered = np.zeros(tiling.padded_dhw, dtype=bool)
    for start in tiling:
        window = tuple(slice(a, a + n) for a, n in zip(start, tiling.tile_dhw, strict=True))
        assert covered[window].shape == tiling.tile_dhw
        covered[window] = True
        assert all(a % s == 0 for a, s in zip(start, tiling.stride_dhw, strict=True))
    assert covered.all()
    assert covered[crop_slices(tiling.shape_dhw)].shape == tiling.shape_dhw


@settings(deadline=None)
@given(tilings())
def test_padding_is_the_least_that_fits(tiling: Tiling) -> None:
    for padded, length, tile, stride in zip(
        tiling.padded_dhw, tiling.shape_dhw, tiling.tile_dhw, tiling.stride_dhw, strict=True
    ):
        assert padded % stride == 0
        assert padded == tile or padded - length < stride


@settings(deadline=None)
@given(tilings())
def test_counts_order_and_determinism(tiling: Tiling) -> None:
    starts = list(tiling)
    assert len(starts) == len(tiling) == np.prod(tiling.counts)
    assert starts == sorted(set(starts))
    again = Tiling(tiling.shape_dhw, tiling.tile_dhw, tiling.overlap, tiling.stride_dhw)
    assert list(again) == starts
    for axis, (line, tile, stride) in enumerate(zip(tiling.starts, tiling.tile_dhw, tiling.stride_dhw, strict=True)):
        for a, b in itertools.pairwise(line):
            assert tile - (b - a) >= min(tiling.overlap * tile - 1e-6, tile - stride), axis


def test_the_chest_of_512_512_604() -> None:
    tiling = Tiling((604, 512, 512), (128, 256, 256), 0.25, (4, 4, 4))
    assert tiling.counts == (6, 3, 3)
    assert len(tiling) == 54
    assert tiling.starts == ((0, 96, 192, 288, 384, 476), (0, 192, 256), (0, 192, 256))
    assert tiling.padded_dhw == (604, 512, 512)


def test_odd_depth_is_padded_to_the_stride() -> None:
    tiling = Tiling((133, 512, 512), (128, 256, 256), 0.25, (4, 4, 4))
    assert tiling.padded_dhw == (136, 512, 512)
    assert tiling.starts[0] == (0, 8)


def test_a_tile_larger_than_the_volume() -> None:
    tiling = Tiling((5, 300, 3), (128, 256, 256), 0.25, (4, 4, 4))
    assert tiling.padded_dhw == (128, 300, 256)
    assert list(tiling) == [(0, 0, 0), (0, 44, 0)]


@pytest.mark.parametrize("overlap", [0.1, 0.2, 0.3, 0.7, 0.9])
def test_decimal_overlaps_are_not_rounded_away(overlap: float) -> None:
    step = Tiling((1000, 1, 1), (100, 1, 1), overlap).starts[0][1]
    assert step == round(100 * (1 - overlap))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (((0, 4, 4), (4, 4, 4)), "shape_dhw"),
        (((4, 4, 4), (4, 0, 4)), "tile_dhw"),
        (((4, 4, 4), (4, 6, 4), 0.25, (4, 4, 4)), "no multiple"),
        (((4, 4, 4), (4, 4, 4), 1.0), "overlap"),
        (((4, 4, 4), (4, 4, 4), float("nan")), "overlap"),
    ],
)
def test_settings_that_cannot_be(arguments: tuple, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        Tiling(*arguments)


@settings(deadline=None, max_examples=60)
@given(tilings())
def test_every_cell_is_the_own_of_one_tile(tiling: Tiling) -> None:
    owners = np.zeros([-(-n // s) * s for n, s in zip(tiling.shape_dhw, tiling.stride_dhw, strict=True)], int)
    for start in tiling:
        own = tiling.own(start)
        assert all(0 <= a.start <= a.stop <= n for a, n in zip(own, tiling.tile_dhw, strict=True))
        assert all(a.start % s == a.stop % s == 0 for a, s in zip(own, tiling.stride_dhw, strict=True))
        owners[tuple(slice(a.start + b, a.stop + b) for a, b in zip(own, start, strict=True))] += 1
    assert (owners == 1).all()
