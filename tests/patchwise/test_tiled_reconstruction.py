"""Whole volumes there and back: both modes, threads, halving on out-of-memory (T43), memory whatever the depth."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset.intensity import HUWindow
from dataset.store import write_store
from dataset.volume_io import Volume
from errors import ConfigurationError, InputError, MemoryExhaustedError
from evaluation.reconstruct import reconstruct
from patchwise_512x512x604.utils.background import WriteBehind, read_ahead
from patchwise_512x512x604.utils.reconstruction import reconstruct_volume
from tests.helpers import ROOT, environment
from tests.vq_gan_3d.test_codec import randomized, tiny_config
from vq_gan_3d.codec import VQCodec

WINDOW = HUWindow()
TILE = (32, 32, 36)


@pytest.fixture(scope="module")
def codec() -> VQCodec:
    torch.set_num_threads(1)
    return randomized(tiny_config()).eval()


@pytest.fixture(scope="module")
def hu() -> np.ndarray:
    return np.random.default_rng(0).integers(-1200, 1300, (45, 38, 50)).astype(np.int16)


def test_halo_mode_is_the_whole_volume(codec: VQCodec, hu: np.ndarray) -> None:
    expected, indices = reconstruct(codec, WINDOW, hu)
    result = reconstruct_volume(codec, hu, WINDOW, tile_dhw=TILE, dtype=np.float32)
    assert result.hu is not None
    np.testing.assert_allclose(result.hu, expected, atol=0.02, rtol=0)
    assert torch.equal(result.code_counts, torch.bincount(indices.flatten(), minlength=512))
    assert result.seconds > 0
    assert result.peak_bytes > 1e8
    rounded = reconstruct_volume(codec, hu, WINDOW, tile_dhw=TILE).hu
    assert rounded is not None
    assert rounded.dtype == np.int16
    assert np.abs(rounded - result.hu).max() <= 0.5


@pytest.mark.parametrize("weights", ["linear", "cosine", "gaussian"])
def test_blend_mode_of_one_tile_is_the_whole_volume(codec: VQCodec, hu: np.ndarray, weights) -> None:
    expected, _ = reconstruct(codec, WINDOW, hu)
    result = reconstruct_volume(
        codec, hu, WINDOW, mode="blend", tile_dhw=(48, 40, 52), weights=weights, dtype=np.float32
    )
    assert result.tiles == 1
    np.testing.assert_allclose(result.hu, expected, atol=0.02, rtol=0)


def test_blend_mode_is_near_and_its_overlap_counts(codec: VQCodec, hu: np.ndarray) -> None:
    expected, _ = reconstruct(codec, WINDOW, hu)
    tiles = {}
    for overlap in (0.0, 0.75):
        result = reconstruct_volume(
            codec, hu, WINDOW, mode="blend", tile_dhw=TILE, overlap=overlap, dtype=np.float32, batch=3
        )
        tiles[overlap] = result.tiles
        assert result.hu is not None
        error = np.abs(result.hu - expected)
        assert 0 < error.mean() < 0.2 * expected.std()  # seams, and nothing worse
        assert int(result.code_counts.sum()) == 12 * 10 * 13  # each cell of the volume once, whatever the overlap
    assert tiles == {0.0: 8, 0.75: 18}


def test_codes_of_overlapping_tiles_are_those_of_the_tile_that_owns_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A codec without context gives every tile the same codes: counted once, they are those of the whole volume."""
    codec = randomized(tiny_config(encoder_blocks=(0, 0, 0), decoder_blocks=(0, 0, 0))).eval()
    monkeypatch.setattr(codec, "encode", lambda x: x[:, :, ::4, ::4, ::4].repeat(1, 4, 1, 1, 1))
    hu = np.random.default_rng(1).integers(-1000, 1000, (45, 38, 50)).astype(np.int16)
    whole = reconstruct_volume(codec, hu, WINDOW, mode="blend", tile_dhw=(48, 40, 52))
    for overlap, batch in ((0.0, 1), (0.25, 3), (0.75, 4)):
        tiled = reconstruct_volume(codec, hu, WINDOW, mode="blend", tile_dhw=TILE, overlap=overlap, batch=batch)
        assert tiled.tiles > 1
        assert torch.equal(tiled.code_counts, whole.code_counts)


@pytest.mark.parametrize("mode", ["halo", "blend"])
def test_t43_out_of_memory_halves_the_batch_with_the_same_output(
    codec: VQCodec, hu: np.ndarray, mode, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # pointwise halves, whose results do not depend on how a convolution splits its sums: equal to the bit
    monkeypatch.setattr(codec, "encode", lambda x: x[:, :, ::4, ::4, ::4].repeat(1, 4, 1, 1, 1))
    seen: list[int] = []

    def decode(codes: torch.Tensor) -> torch.Tensor:
        seen.append(len(codes))
        if limited and len(codes) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.nn.functional.interpolate(codes[:, :1], scale_factor=4)

    monkeypatch.setattr(codec, "decode_quantized", decode)
    limited = False
    free = reconstruct_volume(codec, hu, WINDOW, mode=mode, tile_dhw=TILE, batch=16)
    limited = True
    assert free.batch == 16
    result = reconstruct_volume(codec, hu, WINDOW, mode=mode, tile_dhw=TILE, batch=16)
    assert np.array_equal(result.hu, free.hu)
    assert torch.equal(result.code_counts, free.code_counts)
    assert 1 <= result.batch <= 2 < max(seen)
    assert "out of memory" in caplog.text


def test_t43_the_batch_never_shows(codec: VQCodec, hu: np.ndarray) -> None:
    one, eight = (
        reconstruct_volume(codec, hu, WINDOW, mode="blend", tile_dhw=TILE, batch=batch).hu for batch in (1, 8)
    )
    assert one is not None
    assert eight is not None
    assert np.abs(one.astype(int) - eight).max() <= 1  # the kernel may split its sums otherwise: a rounding of int16


def test_t43_a_tile_too_large_by_itself(codec: VQCodec, hu: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(volume: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(codec, "encode", encode)
    with pytest.raises(MemoryExhaustedError, match="choose a smaller tile"):
        reconstruct_volume(codec, hu, WINDOW, tile_dhw=TILE)


def test_slices_go_to_the_writer_in_order_and_are_its_own(codec: VQCodec, hu: np.ndarray) -> None:
    for mode in ("halo", "blend"):
        kept: list[tuple[int, np.ndarray]] = []
        result = reconstruct_volume(
            codec, hu, WINDOW, mode=mode, tile_dhw=TILE, write=lambda a, s, kept=kept: kept.append((a, s))
        )
        assert result.hu is None
        assert [a for a, _ in kept] == list(np.cumsum([0, *(len(s) for _, s in kept[:-1])]))
        whole = reconstruct_volume(codec, hu, WINDOW, mode=mode, tile_dhw=TILE).hu
        assert np.array_equal(np.concatenate([s for _, s in kept]), whole)


@pytest.mark.parametrize("mode", ["halo", "blend"])
def test_errors_of_reader_and_writer_come_back_and_no_thread_stays(codec: VQCodec, hu: np.ndarray, mode) -> None:
    class Damaged:
        shape = hu.shape

        def __getitem__(self, key):
            raise InputError("volume.b2nd: damaged data: build it again")

    def full(first: int, slices: np.ndarray) -> None:
        raise OSError(28, "No space left on device")

    before = threading.active_count()
    with pytest.raises(InputError, match="damaged"):
        reconstruct_volume(codec, Damaged(), WINDOW, mode=mode, tile_dhw=TILE)
    with pytest.raises(OSError, match="No space"):
        reconstruct_volume(codec, hu, WINDOW, mode=mode, tile_dhw=TILE, write=full)
    assert threading.active_count() == before


def test_what_cannot_be_is_refused(codec: VQCodec, hu: np.ndarray) -> None:
    with pytest.raises(ConfigurationError, match="halo or blend"):
        reconstruct_volume(codec, hu, WINDOW, mode="average")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="linear, cosine, gaussian"):
        reconstruct_volume(codec, hu, WINDOW, mode="blend", weights="box")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="three axes"):
        reconstruct_volume(codec, hu[0], WINDOW)


def test_reading_and_writing_overlap_with_the_rest() -> None:
    done: list[int] = []

    def slow(n: int) -> int:
        time.sleep(0.05)
        return n

    start = time.perf_counter()
    with WriteBehind(lambda n: done.append(slow(n))) as writer:
        for n in read_ahead(slow(n) for n in range(8)):
            writer.put(slow(n))
    assert done == list(range(8))
    assert time.perf_counter() - start < 0.8 * 8 * 3 * 0.05  # one after the other it would be 8 · 3 · 0.05 s


def test_a_reader_that_is_left_early_stops() -> None:
    before, made = threading.active_count(), []
    for n in read_ahead(made.append(n) or n for n in range(1000)):  # type: ignore[func-returns-value]
        if n == 3:
            break
    del n
    assert threading.active_count() == before
    assert len(made) < 10


PEAK = """
import sys
import numpy as np
import torch
from dataset.intensity import HUWindow
from patchwise_512x512x604.utils.reconstruction import reconstruct_volume
from tests.vq_gan_3d.test_codec import randomized, tiny_config

class Water:
    def __init__(self, depth, plane):
        self.shape = (depth, plane, plane)
    def __getitem__(self, key):
        return np.full((key.stop - key.start, *self.shape[1:]), 40, np.int16)

class Instant:
    "Code: every fourth voxel; volume: each repeated."
    def __init__(self):
        self.codec = randomized(tiny_config(encoder_blocks=(0, 0, 0), decoder_blocks=(0, 0, 0))).eval()
        self.codec.encode = lambda x: x[:, :, ::4, ::4, ::4].expand(-1, 4, -1, -1, -1) * 1.0
        self.codec.decode_quantized = lambda c: torch.nn.functional.interpolate(c[:, :1], scale_factor=4)

depth, plane, (mode, kind, tile) = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
torch.set_num_threads(1)
codec = Instant().codec if kind == "instant" else randomized(tiny_config()).eval()
seen = []
result = reconstruct_volume(
    codec, Water(depth, plane), HUWindow(), mode=mode, write=lambda a, s: seen.append(s.nbytes),
    tile_dhw=None if tile == "default" else tuple(map(int, tile.split(","))),
)
assert sum(seen) == 2 * depth * plane * plane, seen
print(result.peak_bytes // 2**20)
"""


# Freed memory goes back at once: what malloc keeps varies by 100 MB from run to run and hides what is held.
THRIFTY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peak_mb(depth: int, plane: int, mode: str, kind: str, tile: str) -> int:
    code = [sys.executable, "-c", PEAK, str(depth), str(plane), mode, kind, tile]
    result = subprocess.run(code, cwd=ROOT, env=environment(**THRIFTY), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return int(result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "tile", "depths"),
    [
        ("halo", "64,256,256", (151, 604, 1208)),
        ("blend", "128,256,256", (151, 604, 1208)),
        ("halo", "default", (604, 1208)),  # 151 slices are a single slab of the default tile, and take less
    ],
)
def test_full_planes_of_any_depth_take_the_same_memory(mode: str, tile: str, depths: tuple[int, ...]) -> None:
    peaks = {depth: peak_mb(depth, 512, mode, "instant", tile) for depth in depths}
    assert max(peaks.values()) < 3000, peaks
    # a slab or two more wait in the queues of a busy machine; a copy of 1208 slices instead of 151 would be 554 MB more
    assert max(peaks.values()) - min(peaks.values()) < 250, peaks


@pytest.mark.slow
def test_a_real_codec_takes_the_same_memory_at_any_depth() -> None:
    peaks = {depth: peak_mb(depth, 96, "halo", "real", "64,64,64") for depth in (151, 1208)}
    assert max(peaks.values()) < 1000, peaks
    assert max(peaks.values()) - min(peaks.values()) < 15, peaks  # a copy of 1208 slices would be 22 MB


MEASURE = """
import sys
from pathlib import Path
import torch
from dataset.intensity import HUWindow
from dataset.sources import StoreSource
from patchwise_512x512x604.evaluation_set import CaseLoop, Model
from tests.vq_gan_3d.test_codec import randomized, tiny_config
from vq_gan_3d.memory import peak_rss_bytes

torch.set_num_threads(1)
codec = randomized(tiny_config(encoder_blocks=(0, 0, 0), decoder_blocks=(0, 0, 0))).eval()
codec.encode = lambda x: x[:, :, ::4, ::4, ::4].expand(-1, 4, -1, -1, -1) * 1.0
codec.decode_quantized = lambda c: torch.nn.functional.interpolate(c[:, :1], scale_factor=4)
model = Model(codec, HUWindow(), tile_dhw=(64, 128, 128))
for _, volume in CaseLoop().over([StoreSource(Path(sys.argv[1]))]):
    _, metrics = model.measure(volume.hu)
assert {"ssim", "psnr_db", "seam_ratio"} <= metrics.keys()
print(peak_rss_bytes() // 2**20)
"""


@pytest.mark.slow
def test_measuring_a_store_takes_the_same_memory_at_any_depth(tmp_path: Path) -> None:
    """What `compute_metrics` does with a `.b2nd`: 1200 slices of 256×256 are 157 MB for each copy that is held."""
    peaks = {}
    for depth in (300, 1200):
        hu = np.random.default_rng(0).integers(-20, 60, (depth, 256, 256), np.int16)
        write_store(tmp_path / f"{depth}.b2nd", Volume(hu, np.eye(4)), {})
        code = [sys.executable, "-c", MEASURE, str(tmp_path / f"{depth}.b2nd")]
        result = subprocess.run(code, cwd=ROOT, env=environment(**THRIFTY), capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-2000:]
        peaks[depth] = int(result.stdout)
    assert peaks[1200] - peaks[300] < 60, peaks
