"""Halo mode: encoding and decoding by tiles equal the whole volume, on any shape, with every quantizer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.intensity import HUWindow
from dataset.store import open_store, write_store
from dataset.tiling import HaloTiling, Triple
from dataset.volume_io import Volume, read_nifti
from errors import ConfigurationError, InputError
from evaluation.reconstruct import reconstruct
from tests.helpers import REAL_DATA
from tests.vq_gan_3d.test_codec import STRIDES, randomized, tiny_config
from vq_gan_3d.codec import CodecConfig, VQCodec
from vq_gan_3d.tiled import code_grid, decode_tiled, decode_volume, encode_tiled
from vq_gan_3d.tiled_batches import default_tile, tile_bytes

WINDOW = HUWindow()
# float32 rounding of unlike splits of sums; some 1e-6 of the codes' spread, and of the window in HU
CODE_TOLERANCE, HU_TOLERANCE = 1e-5, 0.02


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_hu(shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1200, 1300, shape).astype(np.int16)


@torch.inference_mode()
def whole_code(codec: VQCodec, hu: np.ndarray) -> torch.Tensor:
    padding = [(0, -n % s) for n, s in zip(hu.shape, codec.config.total_stride, strict=True)]
    padded = np.pad(hu, padding, constant_values=-1000)
    return codec.encode(WINDOW.to_unit(torch.from_numpy(padded))[None, None])[0]


@torch.inference_mode()
def whole_volume(codec: VQCodec, code: torch.Tensor, shape) -> np.ndarray:
    d, h, w = shape
    return WINDOW.to_hu(codec.decode(code[None])[0, 0, :d, :h, :w]).numpy()


def smallest_tile(config: CodecConfig, more: int = 0) -> tuple[int, int, int]:
    """The least window of both halves, with ``more`` cells inside the halo on each axis."""
    encoder, decoder = config.receptive_halo_vox()
    halo = (max(a, b) for a, b in zip(encoder, decoder, strict=True))
    d, h, w = ((2 * -(-a // s) + 1 + more) * s for a, s in zip(halo, config.total_stride, strict=True))
    return d, h, w


# --- geometry -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(*[st.integers(1, 36)] * 3),
    st.tuples(*[st.integers(1, 4)] * 3),
    st.tuples(*[st.integers(0, 9)] * 3),
    st.tuples(*[st.integers(1, 5)] * 3),
)
def test_kept_parts_fill_the_volume_once_and_have_their_halo(shape, stride, halo, cells) -> None:
    tile = tuple((2 * -(-h // s) + n) * s for h, s, n in zip(halo, stride, cells, strict=True))
    tiling = HaloTiling(shape, tile, halo, stride)
    filled = np.zeros(tiling.padded_dhw, int)
    for part in tiling:
        filled[part.keep] += 1
        for window, keep, inner, reach, step, length, size in zip(
            part.window, part.keep, part.inner, halo, stride, tiling.padded_dhw, tiling.window_dhw, strict=True
        ):
            assert 0 <= window.start <= keep.start < keep.stop <= window.stop <= length
            assert window.stop - window.start == size
            assert window.start % step == keep.start % step == 0
            assert (inner.start, inner.stop) == (keep.start - window.start, keep.stop - window.start)
            assert window.start == 0 or keep.start - window.start >= reach
            assert window.stop == length or window.stop - keep.stop >= reach
    assert (filled == 1).all()
    assert len(tiling) == len(list(tiling)) == sum(len(row) for row in tiling.rows())


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(*[st.integers(1, 36)] * 3),
    st.tuples(*[st.integers(1, 4)] * 3),
    st.tuples(*[st.integers(0, 9)] * 3),
    st.integers(1, 5),
    st.data(),
)
def test_rows_begin_anywhere(shape, stride, halo, cells: int, data: st.DataObject) -> None:
    """From any cell on the kept parts fill the rest of the volume once, with their halo above and below."""
    tile = tuple((2 * -(-h // s) + cells) * s for h, s in zip(halo, stride, strict=True))
    tiling = HaloTiling(shape, tile, halo, stride)
    start = data.draw(st.integers(0, tiling.padded_dhw[0] // stride[0] - 1)) * stride[0]
    filled = np.zeros(tiling.padded_dhw, int)
    for part in (part for row in tiling.rows(start) for part in row):
        filled[part.keep] += 1
        window, keep = part.window[0], part.keep[0]
        assert 0 <= window.start <= keep.start < keep.stop <= window.stop <= tiling.padded_dhw[0]
        assert window.stop - window.start <= tile[0]
        assert window.start % stride[0] == keep.start % stride[0] == 0
        assert window.start == 0 or keep.start - window.start >= halo[0]
        assert window.stop == tiling.padded_dhw[0] or window.stop - keep.stop >= halo[0]
    assert (filled[start:] == 1).all()
    assert not filled[:start].any()


def test_the_latent_grid_of_604_slices() -> None:
    """W×H×D 512×512×604 voxels are 128×128×151 cells; a slice more or less is padded, never cut."""
    codec = VQCodec(tiny_config()).eval()
    assert code_grid(codec, (604, 512, 512)) == (151, 128, 128)
    assert code_grid(codec, (605, 512, 512))[0] == code_grid(codec, (608, 512, 512))[0] == 152
    assert VQCodec(CodecConfig(widths=(8, 8, 8))).config.total_stride == (4, 4, 4)  # that of the default


def test_a_tile_that_is_all_halo_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"at least \[28, 28, 28\]"):
        HaloTiling((100, 100, 100), (24, 24, 24), (10, 12, 12), (4, 4, 4))
    # but a volume that fits in a tile needs no halo
    assert len(HaloTiling((20, 20, 20), (24, 24, 24), (10, 12, 12), (4, 4, 4))) == 1


# --- equality with the whole volume ----------------------------------------------------------------------------------


@pytest.mark.parametrize("quantizer", ["fsq", "ema", "simvq"])
@pytest.mark.parametrize("strides", STRIDES)
def test_every_codec_by_tiles_equals_the_whole_volume(strides: str, quantizer: str) -> None:
    codec = randomized(tiny_config(STRIDES[strides], quantizer=quantizer)).eval()
    tile = smallest_tile(codec.config, more=1)
    hu = random_hu([t + 2 * s + 1 for t, s in zip(tile, codec.config.total_stride, strict=True)])
    expected = whole_code(codec, hu)
    code = encode_tiled(codec, hu, WINDOW, tile_dhw=tile, batch=3)
    assert code.dtype == torch.float32
    torch.testing.assert_close(code, expected, rtol=0, atol=CODE_TOLERANCE)
    decoded = decode_volume(codec, expected, WINDOW, hu.shape, tile_dhw=tile, batch=2)
    np.testing.assert_allclose(decoded, whole_volume(codec, expected, hu.shape), rtol=0, atol=HU_TOLERANCE)


@settings(deadline=None, max_examples=10)
@given(st.tuples(*[st.integers(1, 52)] * 3), st.integers(0, 2), st.integers(1, 4))
def test_any_shape_any_tile_any_batch(shape, more: int, batch: int) -> None:
    torch.set_num_threads(1)
    codec = randomized(tiny_config()).eval()
    tile = smallest_tile(codec.config, more)
    hu = random_hu(shape, seed=sum(shape))
    expected = whole_code(codec, hu)
    assert expected.shape == (4, *(-(-n // 4) for n in shape))
    code = encode_tiled(codec, hu, WINDOW, tile_dhw=tile, batch=batch)
    torch.testing.assert_close(code, expected, rtol=0, atol=CODE_TOLERANCE)
    slabs = list(decode_tiled(codec, expected, tile_dhw=tile, batch=batch))
    assert [at.start for at, _ in slabs] == [0, *(at.stop for at, _ in slabs[:-1])]
    unit = np.concatenate([slab for _, slab in slabs])[: shape[0], : shape[1], : shape[2]]
    np.testing.assert_allclose(WINDOW.to_hu(unit), whole_volume(codec, expected, shape), rtol=0, atol=HU_TOLERANCE)


def test_a_halo_that_is_too_short_shows() -> None:
    """That the tests above can fail: the same tiles with a codec that claims to look less far."""

    class Liar(CodecConfig):
        def receptive_halo_vox(self):
            return (4, 4, 4), (4, 4, 4)

    codec = randomized(tiny_config()).eval()
    hu = random_hu((40, 40, 40))
    expected = whole_code(codec, hu)
    codec.config = Liar(**{key: getattr(codec.config, key) for key in codec.config.as_dict()})
    wrong = encode_tiled(codec, hu, WINDOW, tile_dhw=(20, 20, 20))
    assert (wrong - expected).abs().max() > 100 * CODE_TOLERANCE


def test_a_store_is_read_by_slices(tmp_path) -> None:
    codec = randomized(tiny_config()).eval()
    hu = random_hu((70, 40, 37))
    write_store(tmp_path / "volume.b2nd", Volume(hu, np.eye(4)), {})
    lazy = open_store(tmp_path / "volume.b2nd").hu
    tile = smallest_tile(codec.config)
    assert torch.equal(encode_tiled(codec, lazy, WINDOW, tile_dhw=tile), encode_tiled(codec, hu, WINDOW, tile_dhw=tile))


def test_bfloat16_is_near_and_float32_comes_back() -> None:
    codec = randomized(tiny_config()).eval()
    hu = random_hu((44, 44, 44))
    tile = smallest_tile(codec.config)
    exact = encode_tiled(codec, hu, WINDOW, tile_dhw=tile)
    code = encode_tiled(codec, hu, WINDOW, tile_dhw=tile, precision=torch.bfloat16)
    assert code.dtype == torch.float32
    assert 0 < (code - exact).abs().max() < 0.1 * exact.abs().max()


# --- what it refuses, memory ------------------------------------------------------------------------------------------


def test_bad_arguments_are_one_line_each() -> None:
    codec = randomized(tiny_config()).eval()
    with pytest.raises(InputError, match=r"shape \[3, 4\]"):
        encode_tiled(codec, np.zeros((3, 4), np.int16), WINDOW)
    with pytest.raises(InputError, match=r"decodes \[4, d, h, w\]"):
        decode_tiled(codec, torch.zeros(3, 2, 2, 2))
    with pytest.raises(InputError, match="is not that of a volume"):
        decode_volume(codec, torch.zeros(4, 2, 2, 2), WINDOW, (9, 8, 8))
    with pytest.raises(ConfigurationError, match="no multiple"):
        encode_tiled(codec, random_hu((40, 40, 40)), WINDOW, tile_dhw=(30, 32, 32))
    with pytest.raises(ValueError, match="training mode"):
        encode_tiled(codec.train(), random_hu((8, 8, 8)), WINDOW)


@pytest.mark.parametrize("budget", [2**28, 2**30, 2**33])
def test_the_default_tile_keeps_to_its_budget_and_leaves_room_inside_the_halo(budget: int) -> None:
    config = CodecConfig()
    shape = (604, 512, 512)
    for halo in config.receptive_halo_vox():
        tile = default_tile(config, halo, shape, budget)
        tiling = HaloTiling(shape, tile, halo, config.total_stride)
        assert tile_bytes(config, tiling.window_dhw) <= budget
        # more memory, less work
        work = len(tiling) * math.prod(tiling.window_dhw) / math.prod(shape)
        assert work < {2**28: 9, 2**30: 3.5, 2**33: 1.6}[budget]
    assert default_tile(config, halo, (20, 30, 40), budget) != ()


def test_the_default_tile_is_never_a_column_of_the_whole_depth() -> None:
    """A slab of a tile's depth is held for the whole plane: the cheapest column must not make memory follow depth."""
    config = CodecConfig(widths=(8, 16, 32), encoder_blocks=(1, 1, 1), decoder_blocks=(1, 1, 1))
    for halo in config.receptive_halo_vox():
        for depth in (151, 604, 1208, 5000):
            assert default_tile(config, halo, (depth, 512, 512), 2**33)[0] <= 192
        deep = {default_tile(config, halo, (depth, 512, 512), 2**33) for depth in (604, 1208, 3001)}
        assert len(deep) == 1


# --- real CT ---------------------------------------------------------------------------------------------------------


def real(path: str, at: tuple[slice, slice, slice]) -> np.ndarray:
    if not (REAL_DATA / path).exists():
        pytest.skip("shared real data is absent")
    return np.ascontiguousarray(read_nifti(REAL_DATA / path).hu[at])


def codes_both_ways(codec: VQCodec, hu: np.ndarray, tile: Triple) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The code (C, d, h, w) of a whole volume, and the code numbers (1, d, h, w) of the whole and by tiles.

    The codec is whitened on the volume, as training would leave it: otherwise nearly all voxels share a few codes.
    """
    vectors = whole_code(codec, hu).flatten(1)  # (C, N)
    codec.code_norm.mean.copy_(vectors.mean(1))
    codec.code_norm.covariance.copy_(torch.cov(vectors))
    whole, tiled = whole_code(codec, hu), encode_tiled(codec, hu, WINDOW, tile_dhw=tile)
    with torch.inference_mode():
        return whole, codec.quantizer(whole[None]).indices, codec.quantizer(tiled[None]).indices


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "at"),
    [
        ("ct_2mm/cmbcrc_MSB-01068.nii.gz", (slice(20, 110), slice(20, 147), slice(30, 158))),
        ("ct_native/lidc_0001.nii.gz", (slice(40, 92), slice(100, 261), slice(150, 311))),
    ],
)
@pytest.mark.parametrize("quantizer", ["fsq", "ema"])
def test_real_ct_codes_and_volumes_equal_those_of_the_whole(path: str, at, quantizer: str) -> None:
    hu = real(path, at)
    codec = randomized(tiny_config(encoder_blocks=(1, 1, 2), quantizer=quantizer)).eval()
    tile = (48, 64, 64)
    expected, codes, tiled_codes = codes_both_ways(codec, hu, tile)
    assert len(codes.unique()) > 200
    equal = float((codes == tiled_codes).double().mean())
    assert equal >= 0.9999
    unit = np.concatenate([slab for _, slab in decode_tiled(codec, expected, tile_dhw=tile)])
    with torch.inference_mode():
        whole = codec.decode(expected[None])[0, 0].numpy()
    assert np.abs(unit - whole).max() <= 1e-5 * max(1.0, float(np.abs(whole).max()))
    # and the plain evaluation of whole volumes gives the same codes
    _, plain = reconstruct(codec, WINDOW, hu)
    assert torch.equal(plain, codes[0])


@pytest.mark.slow
def test_the_default_codec_on_real_ct_by_tiles(capsys: pytest.CaptureFixture[str]) -> None:
    """Its own widths and halo (24, 26, 26): two windows along each axis of a real chest against the whole at once."""
    hu = real("ct_native/lidc_0001.nii.gz", (slice(70, 134), slice(220, 292), slice(220, 292)))
    codec = randomized(CodecConfig()).eval()
    assert codec.config.receptive_halo_vox() == ((24, 26, 26), (24, 26, 26))
    tile = (56, 64, 64)
    expected, codes, tiled_codes = codes_both_ways(codec, hu, tile)
    with torch.inference_mode():
        whole = codec.decode(expected[None])[0, 0].numpy()
    unit = np.concatenate([slab for _, slab in decode_tiled(codec, expected, tile_dhw=tile)])
    equal = float((codes == tiled_codes).double().mean())
    off = float(np.abs(unit - whole).max()) / max(1.0, float(np.abs(whole).max()))
    with capsys.disabled():
        print(f"\n{equal:.4%} of {codes.numel()} codes equal ({len(codes.unique())} in use), decoded off by {off:.1e}")
    assert len(codes.unique()) > 200
    assert equal >= 0.9999
    assert off <= 1e-5
