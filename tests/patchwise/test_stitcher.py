"""The stitcher: identity to the bit (T32-T34), weights, order, and memory that does not grow with depth."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.memory import peak_rss_of
from dataset.tiling import Tiling, Triple
from errors import ConfigurationError
from patchwise_512x512x604.utils.patch_utils import Kind, Stitcher, axis_plan, blend_weights
from tests.helpers import ROOT, environment

KINDS: tuple[Kind, ...] = ("linear", "cosine", "gaussian")


def stitched(tiling: Tiling, tiles, kind: Kind = "linear", dtype=np.float32) -> np.ndarray:
    """Stitch ``tiles(start)``; slices must come in order, each once."""
    result, expected = np.zeros(tiling.shape_dhw, dtype), 0

    def write(first: int, slices: np.ndarray) -> None:
        nonlocal expected
        assert first == expected
        assert slices.dtype == dtype
        result[first : first + len(slices)] = slices
        expected += len(slices)

    stitcher = Stitcher(tiling, kind, write, dtype)
    for start in tiling:
        stitcher.add(start, tiles(start))
    stitcher.finish()
    assert expected == tiling.shape_dhw[0]
    return result


def cut(volume: np.ndarray, tile: Triple):
    return lambda start: volume[tuple(slice(a, a + n) for a, n in zip(start, tile, strict=True))]


def by_definition(tiling: Tiling, tiles, kind: Kind) -> np.ndarray:
    """Sum of weights times tiles over the sum of weights, in float64 volumes."""
    total, mass = np.zeros(tiling.padded_dhw), np.zeros(tiling.padded_dhw)
    for start in tiling:
        weights = []
        for at, line, tile in zip(start, tiling.starts, tiling.tile_dhw, strict=True):
            i = line.index(at)
            before = line[i - 1] + tile - at if i else 0
            after = at + tile - line[i + 1] if i + 1 < len(line) else 0
            weights.append(blend_weights(tile, max(0, before), max(0, after), kind))
        product = weights[0][:, None, None] * weights[1][:, None] * weights[2]
        at = tuple(slice(a, a + n) for a, n in zip(start, tiling.tile_dhw, strict=True))
        total[at] += product * tiles(start)
        mass[at] += product
    d, h, w = tiling.shape_dhw
    return (total / mass)[:d, :h, :w]


@st.composite
def tilings(draw: st.DrawFn) -> Tiling:
    shape = draw(st.tuples(*[st.integers(1, 40)] * 3))
    tile = draw(st.tuples(*[st.integers(1, 24)] * 3))
    tiling = Tiling(shape, tile, draw(st.floats(0, 0.9)))
    while len(tiling) > 300:  # thousands of tiles of a voxel or two show nothing more
        tile = tuple(min(24, 2 * n) for n in tile)
        smaller = Tiling(shape, tile, tiling.overlap)
        if smaller.tile_dhw == tiling.tile_dhw:
            tiling = Tiling(shape, tile, 0.5)
            break
        tiling = smaller
    return tiling


@settings(deadline=None, max_examples=60)
@given(tilings(), st.sampled_from(KINDS), st.sampled_from([np.float32, np.int16]), st.integers(0, 2**32 - 1))
def test_t32_identity_is_equal_to_the_bit(tiling: Tiling, kind: Kind, dtype: type, seed: int) -> None:
    rng = np.random.default_rng(seed)
    if dtype is np.int16:
        volume = rng.integers(-32768, 32768, tiling.padded_dhw, dtype=np.int16)
    else:  # all magnitudes, subnormals too
        exponents = rng.uniform(-140, 120, tiling.padded_dhw)
        volume = (rng.choice([-1.0, 1.0], tiling.padded_dhw) * 2.0**exponents).astype(np.float32)
    d, h, w = tiling.shape_dhw
    assert np.array_equal(stitched(tiling, cut(volume, tiling.tile_dhw), kind, dtype), volume[:d, :h, :w])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.1, -1000.0, 1e-38, 3e38])
def test_t33_a_constant_field_stays_constant(kind: Kind, value: float) -> None:
    tiling = Tiling((30, 17, 23), (9, 8, 7), 0.7)
    tile = np.full(tiling.tile_dhw, value, np.float32)
    assert np.array_equal(stitched(tiling, lambda start: tile, kind), np.full(tiling.shape_dhw, value, np.float32))


@settings(deadline=None, max_examples=25)
@given(tilings(), st.sampled_from(KINDS))
def test_tiles_that_differ_are_the_weighted_mean(tiling: Tiling, kind: Kind) -> None:
    def tiles(start: Triple) -> np.ndarray:
        return np.random.default_rng(start).standard_normal(tiling.tile_dhw, np.float32)

    # float32 running means: a rounding for each tile that meets in a voxel, along each axis
    np.testing.assert_allclose(stitched(tiling, tiles, kind), by_definition(tiling, tiles, kind), atol=3e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_an_axis_are_a_partition_of_unity(kind: Kind) -> None:
    tile, starts = 24, (0, 10, 17, 30)
    share = np.zeros((len(starts), starts[-1] + tile))
    for index, (start, shared) in enumerate(zip(starts, axis_plan(starts, tile, kind), strict=True)):
        assert ((shared.share > 0) & (shared.share < 1)).all()
        own = np.ones(tile)
        own[: shared.length] = shared.share
        share[:, start : start + tile] *= 1 - own  # what is left of those before
        share[index, start : start + tile] = own
    np.testing.assert_allclose(share.sum(0), 1, atol=1e-6)


def test_linear_weights_by_hand() -> None:
    assert blend_weights(6, 2, 4, "linear").tolist() == [0.25, 0.75, 0.875, 0.625, 0.375, 0.125]
    assert blend_weights(4, 0, 0, "linear").tolist() == [1, 1, 1, 1]
    rise, fall = blend_weights(8, 4, 0, "cosine")[:4], blend_weights(8, 0, 4, "cosine")[4:]
    np.testing.assert_allclose(rise + fall, 1)
    gaussian = blend_weights(8, 1, 1, "gaussian")
    np.testing.assert_allclose(gaussian[[0, 3]], [np.exp(-0.5 * 3.5**2), np.exp(-0.5 * 0.5**2)])


def test_a_step_between_two_tiles_is_a_ramp() -> None:
    tiling = Tiling((1, 1, 12), (1, 1, 8), 0.5)
    line = stitched(tiling, lambda start: np.full((1, 1, 8), float(start[2] > 0), np.float32))[0, 0]
    np.testing.assert_allclose(line, [0, 0, 0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1, 1, 1], atol=1e-7)


def test_torch_tiles_half_precision_and_read_only_arrays(recwarn: pytest.WarningsRecorder) -> None:
    tiling = Tiling((12, 10, 9), (8, 6, 5), 0.5)
    volume = np.random.default_rng(0).integers(-1000, 1000, tiling.padded_dhw).astype(np.float32)
    volume.setflags(write=False)
    assert np.array_equal(stitched(tiling, cut(volume, tiling.tile_dhw)), volume)
    as_tensor = lambda start: torch.from_numpy(cut(volume, tiling.tile_dhw)(start).copy()).half()  # noqa: E731
    assert np.array_equal(stitched(tiling, as_tensor), volume)
    assert not recwarn


def test_wrong_order_size_number_and_kind_are_refused() -> None:
    tiling = Tiling((8, 8, 8), (8, 8, 5))
    tile = np.zeros((8, 8, 5), np.float32)
    stitcher = Stitcher(tiling, "linear", lambda first, slices: None)
    with pytest.raises(ValueError, match=r"next is \(0, 0, 0\)"):
        stitcher.add((0, 0, 3), tile)
    stitcher = Stitcher(tiling, "linear", lambda first, slices: None)
    with pytest.raises(ValueError, match=r"\[8, 8, 4\] voxels"):
        stitcher.add((0, 0, 0), tile[..., :4])
    stitcher = Stitcher(tiling, "linear", lambda first, slices: None)
    stitcher.add((0, 0, 0), tile)
    with pytest.raises(ValueError, match="missing"):
        stitcher.finish()
    with pytest.raises(ConfigurationError, match="linear, cosine, gaussian"):
        Stitcher(tiling, "hann", lambda first, slices: None)  # type: ignore[arg-type]


PEAK = """
import sys
import numpy as np
from dataset.tiling import Tiling
from patchwise_512x512x604.utils.patch_utils import Stitcher
from vq_gan_3d.memory import peak_rss_bytes
depth = int(sys.argv[1])
tiling = Tiling((depth, 512, 512), (128, 256, 256), 0.25, (4, 4, 4))
plane = (np.arange(512)[:, None] * 3 + np.arange(512)).astype(np.int32)  # of no two places the same tile or slice
tile, wrong, seen = np.empty(tiling.tile_dhw, np.float32), 0, 0
def write(first, slices):
    global wrong, seen
    for d, there in enumerate(slices, first):
        wrong += int((there != (d * 7 + plane) % 1021).sum())
    seen += len(slices)
stitcher = Stitcher(tiling, "linear", write)
for start in tiling:
    part = plane[start[1] : start[1] + 256, start[2] : start[2] + 256]
    for i in range(len(tile)):
        tile[i] = ((start[0] + i) * 7 + part) % 1021
    stitcher.add(start, tile)
stitcher.finish()
print(len(tiling), wrong, seen, peak_rss_bytes() // 2**20)
"""


@pytest.mark.slow
def test_t34_full_size_in_memory_that_does_not_grow_with_depth() -> None:
    peaks = {}
    for depth, tiles in ((151, 18), (604, 54), (1208, 117)):
        code = [sys.executable, "-c", PEAK, str(depth)]
        result = subprocess.run(code, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
        count, wrong, seen, peak = map(int, result.stdout.split())
        assert (count, wrong, seen) == (tiles, 0, depth)
        peaks[depth] = peak
    assert max(peaks.values()) < 1500, peaks
    # not with depth, but with what the last tile, moved back inside, shares: 104 slices of 151 and 1208, 36 of 604
    assert max(peaks.values()) - min(peaks.values()) < 100, peaks
    assert abs(peaks[151] - peaks[1208]) < 30, peaks


def stitch_full_size() -> Callable[[], object]:
    """A step that stitches 512×512×604 voxels into an output that is there already."""
    tiling = Tiling((604, 512, 512), (128, 256, 256), 0.25, (4, 4, 4))
    output, tile = np.ones(tiling.shape_dhw, np.float32), np.ones(tiling.tile_dhw, np.float32)

    def write(first: int, slices: np.ndarray) -> None:
        output[first : first + len(slices)] = slices

    def step() -> None:
        stitcher = Stitcher(tiling, "gaussian", write)
        for start in tiling:
            stitcher.add(start, tile)
        stitcher.finish()

    return step


@pytest.mark.slow
def test_t34_the_stitcher_takes_at_most_400_mb_above_its_output() -> None:
    """The benchmark (`benchmarks/stitch.py`) has 256 MB on a quiet machine."""
    taken = peak_rss_of(stitch_full_size)
    assert 50e6 < taken <= 400e6, f"{taken / 1e6:.0f} MB"  # a slab of 128 slices alone is 134 MB
