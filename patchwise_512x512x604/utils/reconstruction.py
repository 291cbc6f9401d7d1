"""Encode and decode a whole volume of any depth, in memory that does not grow with it.

Two modes. ``halo``: tiles with a halo of the receptive field, the result of the whole volume at once (see
`vq_gan_3d.tiled`). ``blend``: overlapping tiles, each coded by itself, blended by `patch_utils.Stitcher`. Reading,
computing and writing overlap, each in a thread of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from dataset.intensity import HUWindow
from dataset.tiling import HaloTiling, Tiling, Triple
from errors import ConfigurationError, InputError
from patchwise_512x512x604.utils.background import WriteBehind, read_ahead
from patchwise_512x512x604.utils.patch_utils import Kind, Stitcher, Write
from vq_gan_3d.codec import VQCodec
from vq_gan_3d.memory import peak_rss_bytes
from vq_gan_3d.tiled import (
    CodeSlab,
    HUArray,
    code_grid,
    decode_slabs,
    decoder_tiles,
    encode_slabs,
    encoder_tiles,
    read_padded,
)
from vq_gan_3d.tiled_batches import TileRunner, free_bytes, tile_bytes

Mode = Literal["halo", "blend"]
TILE_DHW: Triple = (128, 256, 256)
MAX_BATCH = 8
_SLICES = 16  # brought to HU and written at a time: what this takes besides the slab stays small


@dataclass(frozen=True)
class ReconstructionResult:
    """A reconstructed volume and what it took.

    Attributes:
        hu: (D, H, W); ``None`` where it went to a writer.
        code_counts: how often each code was used, int64 (n_codes,); for `evaluation.metrics.codebook`. Each cell of the
            volume's latent grid counts once: in blend mode for the tile that answers for it (`Tiling.own`).
        tiling: where the decoded tiles meet; after a tile that did not fit, that of the smaller ones.
        tiles: windows that were computed (encoder and decoder separately in halo mode).
        batch: tiles at a time, after any halving on out-of-memory.
        seconds: from the first slice read to the last one written, writer included.
        peak_bytes: on CUDA the most that tensors held during the call; on the CPU the most that the process has ever
            had resident.
    """

    hu: np.ndarray | None
    code_counts: Tensor
    tiling: Tiling | HaloTiling
    tiles: int
    batch: int
    seconds: float
    peak_bytes: int


def reconstruct_volume(
    codec: VQCodec,
    hu: HUArray,
    window: HUWindow,
    *,
    mode: Mode = "halo",
    tile_dhw: Triple | None = None,
    overlap: float = 0.25,
    weights: Kind = "linear",
    batch: int | None = None,
    device: str | torch.device | None = None,
    precision: torch.dtype | None = None,
    write: Write | None = None,
    dtype: np.dtype | type[np.generic] = np.int16,
) -> ReconstructionResult:
    """Encode, quantise and decode a volume.

    Args:
        codec: in evaluation mode.
        hu: (D, H, W) in HU, any size; an array or anything that slices like one (`dataset.store.LazyHU`).
        window: the codec's HU window; what comes back is clipped to it.
        mode: ``halo`` or ``blend``.
        tile_dhw: a tile [D, H, W] in voxels, multiples of the total stride; in halo mode the halo is inside. Default
            128×256×256 in blend mode; in halo mode what fits the memory with the least work, smaller on out-of-memory.
        overlap: of neighbouring tiles in blend mode, a share in [0, 1).
        weights: of blend mode: ``linear``, ``cosine`` or ``gaussian``.
        batch: tiles at a time; default from the free memory of a GPU, 1 on the CPU, where more gains nothing. Halved on
            out-of-memory, with the same output.
        device: where to compute; the codec is moved there. Default where it is.
        precision: ``torch.bfloat16`` for autocast, near the whole volume's result; ``None`` for fp32.
        write: called from a thread with the number of the first slice and (slices, H, W) of ``dtype``, in order along
            depth; the array is the callee's to keep.
        dtype: of the HU that come back: int16 (rounded) or float32.

    Raises:
        ConfigurationError: unknown mode or weights, or a tile that cannot be.
        InputError: not three axes, or the codec gives values that are not finite.
        MemoryExhaustedError: a single tile does not fit.
    """
    if mode not in get_args(Mode):
        raise ConfigurationError(f"mode={mode!r} is unknown: use {' or '.join(get_args(Mode))}")
    code_grid(codec, hu.shape)  # refuses what is no volume
    shape = (hu.shape[0], hu.shape[1], hu.shape[2])
    if device is not None:
        codec = codec.to(device)
    where = next(codec.parameters()).device
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    result = np.empty(shape, dtype) if write is None else None
    if batch is None:  # the default tile of halo mode takes a budget of memory by itself
        batch = 1 if mode == "halo" and tile_dhw is None else free_batch(codec, tile_dhw or TILE_DHW, where, precision)
    runner = TileRunner(codec, batch, precision)
    counts = torch.zeros(codec.config.n_codes, dtype=torch.int64)

    def store(first: int, unit: np.ndarray) -> None:
        for at in range(0, len(unit), _SLICES):
            part = unit[at : at + _SLICES]
            require_finite(bool(np.isfinite(part).all()))  # before it is clipped, which makes infinity plausible HU
            out = window.to_hu(part)
            out = np.rint(out, out=out).astype(dtype) if np.dtype(dtype).kind in "iu" else out.astype(dtype, copy=False)
            if write is not None:
                write(first + at, out)
            elif result is not None:
                result[first + at : first + at + len(out)] = out

    start = time.perf_counter()
    with WriteBehind(store) as writer:
        tiling: Tiling | HaloTiling
        if mode == "halo":
            tiling = _by_halo(codec, hu, window, shape, tile_dhw, runner, counts, writer)
        else:
            tiling = Tiling(shape, tile_dhw or TILE_DHW, overlap, codec.config.total_stride)
            _by_blending(codec, hu, window, tiling, weights, runner, counts, writer)
    seconds = time.perf_counter() - start
    return ReconstructionResult(result, counts, tiling, runner.tiles, runner.batch, seconds, _peak_bytes(where))


def require_finite(finite: bool) -> None:
    """Refuse what a codec gave unless it is ``finite``.

    Raises:
        InputError: it is not.
    """
    if not finite:
        raise InputError(
            "the codec gives values that are not finite: take another checkpoint, and fp32 where bf16 was asked for"
        )


def free_batch(codec: VQCodec, tile_dhw: Triple, device: torch.device, precision: torch.dtype | None) -> int:
    """Tiles that fit in three quarters of a GPU's free memory, between 1 and `MAX_BATCH`; 1 on the CPU."""
    if device.type != "cuda":
        return 1
    return max(1, min(MAX_BATCH, int(0.75 * free_bytes(device)) // tile_bytes(codec.config, tile_dhw, precision)))


def _by_halo(
    codec: VQCodec,
    hu: HUArray,
    window: HUWindow,
    shape: Triple,
    tile_dhw: Triple | None,
    runner: TileRunner,
    counts: Tensor,
    writer: WriteBehind,
) -> HaloTiling:
    """Returns where the decoded tiles meet."""
    grid = code_grid(codec, shape)

    def counted() -> Iterator[CodeSlab]:
        tiles = encoder_tiles(codec, hu, tile_dhw, runner)
        for rows, slab in encode_slabs(codec, hu, window, tiles, ahead=read_ahead):
            require_finite(bool(slab.isfinite().all()))  # what is no number has no code to count
            with torch.inference_mode():
                _count(codec.quantizer(slab.to(runner.device)[None]).indices, counts)
            yield rows, slab

    tiles = decoder_tiles(codec, grid, tile_dhw, runner)
    for at, unit in decode_slabs(codec, counted(), grid, tiles):
        cropped = unit[: shape[0] - at.start, : shape[1], : shape[2]]
        writer.put(at.start, cropped)
    return replace(tiles.tiling, shape_dhw=shape)  # what is padded has no seam to show


def _by_blending(
    codec: VQCodec,
    hu: HUArray,
    window: HUWindow,
    tiling: Tiling,
    kind: Kind,
    runner: TileRunner,
    counts: Tensor,
    writer: WriteBehind,
) -> None:
    def rows() -> Iterator[tuple[list[Triple], np.ndarray]]:
        for d in tiling.starts[0]:
            slices = read_padded(hu, slice(d, d + tiling.tile_dhw[0]), tiling.padded_dhw)
            yield [(d, h, w) for h in tiling.starts[1] for w in tiling.starts[2]], slices

    uncounted: list[Tensor] = []

    def code_and_back(volume: Tensor) -> Tensor:
        code = codec.encode(volume)  # (B, C, d, h, w)
        require_finite(bool(code.isfinite().all()))
        quantized = codec.quantizer(code)
        uncounted[:] = quantized.indices  # counted below, once the batch is through: it may run out of memory here
        return codec.decode_quantized(quantized.codes)  # (B, 1, D, H, W)

    # the stitcher's array is used again, so what waits for the writer is a copy
    stitcher = Stitcher(tiling, kind, lambda first, unit: writer.put(first, unit.copy()))
    height, width = tiling.tile_dhw[1:]
    for starts, slices in read_ahead(rows()):

        def load(start: Triple, slices: np.ndarray = slices) -> Tensor:
            part = slices[:, start[1] : start[1] + height, start[2] : start[2] + width]
            return window.to_unit(torch.from_numpy(np.ascontiguousarray(part)).to(runner.device))[None]  # (1, D, H, W)

        for start, volume in runner.map(code_and_back, starts, load):
            stitcher.add(start, volume[0])
            del volume  # a view of its batch, which would be held while the next is computed
            own = zip(tiling.own(start), tiling.stride_dhw, strict=True)
            _count(uncounted.pop(0)[tuple(slice(a.start // s, a.stop // s) for a, s in own)], counts)
    stitcher.finish()


def _count(indices: Tensor, counts: Tensor) -> None:
    """Add the use of code numbers of any shape to ``counts``."""
    counts.add_(torch.bincount(indices.flatten(), minlength=len(counts)).cpu())


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_rss_bytes()
