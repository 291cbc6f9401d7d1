"""Tiles that fit the memory (T43): budgets, smaller tiles on out-of-memory with the same output, fp32 that is fp32."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

from dataset.intensity import HUWindow
from errors import MemoryExhaustedError
from patchwise_512x512x604.utils.reconstruction import free_batch, reconstruct_volume
from tests.vq_gan_3d.test_codec import randomized, tiny_config
from vq_gan_3d import tiled_batches
from vq_gan_3d.codec import VQCodec
from vq_gan_3d.tiled import decode_tiled, encode_tiled
from vq_gan_3d.tiled_batches import TileRunner, default_tile, tile_budget, tile_bytes

WINDOW = HUWindow()
CUDA = torch.device("cuda")
GIB = 1 << 30


@pytest.fixture
def codec() -> VQCodec:
    return randomized(tiny_config()).eval()


@pytest.fixture
def hu() -> np.ndarray:
    return np.random.default_rng(0).integers(-1200, 1300, (150, 70, 66)).astype(np.int16)


def gpu(monkeypatch: pytest.MonkeyPatch, free: int, held: int = 0) -> None:
    """A GPU with that much free, besides ``held`` bytes that torch keeps for reuse."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: held + GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: GIB)


@pytest.mark.parametrize(
    ("free", "held", "budget"),
    [(78, 0, 8), (24, 0, 8), (11.5, 0, 4), (7.9, 0, 2), (0.1, 7.95, 4), (0.0001, 0, 1 / 16)],
)
def test_t43_a_tile_may_take_half_of_what_a_gpu_has_free(
    monkeypatch: pytest.MonkeyPatch, codec: VQCodec, free: float, held: float, budget: float
) -> None:
    gpu(monkeypatch, int(free * GIB), int(held * GIB))
    assert tile_budget(CUDA) == int(budget * GIB)
    assert tile_budget(torch.device("cpu")) == GIB
    one = tile_bytes(codec.config, (128, 256, 256))
    assert free_batch(codec, (128, 256, 256), CUDA, None) == max(1, min(8, int(0.75 * (free + held) * GIB) // one))


def refuse_above(monkeypatch: pytest.MonkeyPatch, codec: VQCodec, cells: int, after: int = 0) -> list[int]:
    """Make a codec that has no memory for more cells at once, from the ``after``-th tile of each half on.

    Encoding takes every fourth voxel and decoding repeats each: equal to the bit whatever the tiles.
    """
    seen: list[int] = []

    def check(count: int, done: list[int]) -> None:
        done.append(count)
        if count > cells and len(done) > after:
            raise torch.OutOfMemoryError("CUDA out of memory")
        seen.append(count)

    encoded: list[int] = []
    decoded: list[int] = []

    def encode(volume: torch.Tensor) -> torch.Tensor:
        check(volume.numel() // 64, encoded)
        return volume[:, :, ::4, ::4, ::4].repeat(1, 4, 1, 1, 1)

    def decode(codes: torch.Tensor) -> torch.Tensor:
        check(codes[:, :1].numel(), decoded)
        return torch.nn.functional.interpolate(codes[:, :1], scale_factor=4)

    monkeypatch.setattr(codec, "encode", encode)
    monkeypatch.setattr(codec, "decode_quantized", decode)
    return seen


@pytest.mark.parametrize("after", [0, 1, 3])  # tiles before the memory is short: the volume is begun with large ones
def test_t43_tiles_shrink_until_they_fit_with_the_same_output(
    codec: VQCodec, hu: np.ndarray, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, after: int
) -> None:
    monkeypatch.setattr(tiled_batches, "_BUDGET_BYTES", {"cpu": 1 << 26})
    monkeypatch.setattr(tiled_batches, "_LEAST_BUDGET_BYTES", 1 << 22)
    monkeypatch.setattr(tiled_batches, "_SLAB_BYTES", 64 * 72 * 68 * 4)  # several rows of tiles
    with monkeypatch.context() as free:
        refuse_above(free, codec, 10**9)
        expected = reconstruct_volume(codec, hu, WINDOW)
        code = encode_tiled(codec, hu, WINDOW)
    with monkeypatch.context() as short:
        seen = refuse_above(short, codec, 3000, after)
        result = reconstruct_volume(codec, hu, WINDOW)
        if after == 0:
            assert max(seen) <= 3000
            assert torch.equal(encode_tiled(codec, hu, WINDOW), code)
    assert np.array_equal(result.hu, expected.hu)
    assert torch.equal(result.code_counts, expected.code_counts)
    assert result.tiling.tile_dhw != expected.tiling.tile_dhw
    assert result.tiling.shape_dhw == hu.shape
    assert result.tiles > expected.tiles
    assert "smaller" not in caplog.text
    assert "going on with tiles of" in caplog.text


def test_t43_a_real_codec_begun_with_large_tiles_goes_on_with_small_ones(
    codec: VQCodec, hu: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiled_batches, "_BUDGET_BYTES", {"cpu": 1 << 25})
    monkeypatch.setattr(tiled_batches, "_LEAST_BUDGET_BYTES", 1 << 22)
    monkeypatch.setattr(tiled_batches, "_SLAB_BYTES", 64 * 72 * 68 * 4)
    expected = encode_tiled(codec, hu, WINDOW)
    volume = np.concatenate([slab for _, slab in decode_tiled(codec, expected)])
    for half in ("encode", "decode"):
        real, sizes = getattr(codec, half), []

        def limited(tensor: torch.Tensor, real=real, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor[0, 0].numel())
            if len(sizes) > 2 and sizes[-1] > 0.6 * sizes[0]:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(tensor)

        with monkeypatch.context() as short:
            short.setattr(codec, half, limited)
            if half == "encode":
                torch.testing.assert_close(encode_tiled(codec, hu, WINDOW), expected, rtol=0, atol=1e-5)
            else:
                slabs = list(decode_tiled(codec, expected))
                assert [at.start for at, _ in slabs] == [0, *(at.stop for at, _ in slabs[:-1])]
                np.testing.assert_allclose(np.concatenate([slab for _, slab in slabs]), volume, rtol=0, atol=1e-5)
        assert min(sizes) < 0.6 * max(sizes)


def test_t43_a_single_tile_that_does_not_fit_is_a_memory_error(codec: VQCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[int] = []

    def no_memory(volume: torch.Tensor) -> torch.Tensor:
        attempts.append(volume.numel())
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(codec, "encode", no_memory)
    hu = np.zeros((80, 80, 80), np.int16)
    with pytest.raises(MemoryExhaustedError, match="choose a smaller tile"):
        encode_tiled(codec, hu, WINDOW, tile_dhw=(48, 48, 48))
    assert attempts == [48**3]  # what was asked for is not made smaller
    with pytest.raises(MemoryExhaustedError, match="choose a smaller tile"):
        encode_tiled(codec, hu, WINDOW)


def test_the_results_of_a_batch_are_gone_when_the_next_is_computed(codec: VQCodec) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def compute(batch: torch.Tensor) -> torch.Tensor:
        gc.collect()
        alive.append(sum(ref() is not None for ref in made))
        result = batch + 1
        made.append(weakref.ref(result))
        return result

    for number, result in TileRunner(codec, 2).map(compute, range(6), lambda n: torch.full((3,), float(n))):
        assert result.tolist() == [number + 1.0] * 3
        del result
    assert alive == [0, 0, 0]


def test_tiles_do_not_hold_the_tile_before(codec: VQCodec, hu: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """All three roads that loop over results: encoding, decoding, blending."""
    for half in ("encode", "decode", "decode_quantized"):
        real = getattr(codec, half)
        made: list[weakref.ref[torch.Tensor]] = []
        alive: list[int] = []

        def watched(tensor: torch.Tensor, real=real, made: list = made, alive: list[int] = alive) -> torch.Tensor:
            gc.collect()
            alive.append(sum(ref() is not None for ref in made))
            result = real(tensor)
            made.append(weakref.ref(result))
            return result

        with monkeypatch.context() as context:
            context.setattr(codec, half, watched)
            mode = "blend" if half == "decode_quantized" else "halo"
            reconstruct_volume(codec, hu[:40, :40, :44], WINDOW, mode=mode, tile_dhw=(32, 32, 36))
        assert len(alive) > 2
        assert not any(alive)


def test_fp32_on_cuda_is_no_tf32_and_the_setting_comes_back(codec: VQCodec) -> None:
    convolutions = torch.backends.cudnn.conv
    seen: list[str] = []

    def compute(batch: torch.Tensor) -> torch.Tensor:
        seen.append(convolutions.fp32_precision)
        if len(seen) == 3:
            raise ValueError("a bug")
        return batch

    before = convolutions.fp32_precision
    convolutions.fp32_precision = "tf32"  # torch's default where there is CUDA
    try:
        for precision in (None, torch.bfloat16):
            list(TileRunner(codec, 1, precision).map(compute, [0], lambda _: torch.zeros(1)))
            assert convolutions.fp32_precision == "tf32"
        with pytest.raises(ValueError, match="a bug"):
            list(TileRunner(codec, 1).map(compute, [0], lambda _: torch.zeros(1)))
        assert convolutions.fp32_precision == "tf32"
    finally:
        convolutions.fp32_precision = before
    assert seen == ["ieee", "tf32", "ieee"]


def test_less_memory_is_more_work_and_never_a_tile_over_budget(codec: VQCodec) -> None:
    halo = codec.config.receptive_halo_vox()[0]
    sizes = [tile_bytes(codec.config, default_tile(codec.config, halo, (604, 512, 512), 2**n)) for n in range(24, 31)]
    assert sizes == sorted(sizes)
    assert all(size <= 2**n for n, size in enumerate(sizes, 24))
