"""Encode and decode a volume of any size tile by tile, with the result of the whole volume at once.

The codec is local: a latent depends on its own cell and a halo around it (`CodecConfig.receptive_halo_vox`), a voxel on
its own latent and a halo of latents. A window that holds the halo gives the inside exactly (to fp32 rounding, which
depends on how a kernel splits its sums), and a window at the border of the volume meets the same zero padding. Nothing
is blended, the latents are one seamless grid whatever the tiles, and finished slabs leave along depth, so that memory
does not grow with it. Where nobody asks for a size of tiles, they shrink until one fits the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dataset.intensity import HUWindow
from dataset.tiling import HaloTile, HaloTiling, Triple
from errors import InputError
from params import HU_AIR
from vq_gan_3d.codec import VQCodec
from vq_gan_3d.tiled_batches import FittingTiles, TileRunner


class HUArray(Protocol):
    """What slices like a numpy volume (D, H, W) in HU: an array, a memory map, a store."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along D, H, W."""
        ...

    def __getitem__(self, key: Any, /) -> np.ndarray: ...


Slab = tuple[slice, np.ndarray]
CodeSlab = tuple[slice, Tensor]
Slices = tuple[slice, ...]


def encode_tiled(
    codec: VQCodec,
    hu: HUArray,
    window: HUWindow,
    *,
    tile_dhw: Triple | None = None,
    batch: int = 1,
    precision: torch.dtype | None = None,
) -> Tensor:
    """Continuous code of a whole volume: one seamless grid, equal to encoding the volume at once.

    Args:
        codec: in evaluation mode.
        hu: (D, H, W) in HU, any size; anything that slices like an array (`dataset.store.LazyHU`). Padded with air at
            the end of each axis to the codec's total stride.
        window: the codec's HU window.
        tile_dhw: size of a window, halo included; default: what fits the memory, see `FittingTiles`.
        batch: windows at a time; halved on out-of-memory.
        precision: ``torch.bfloat16`` for autocast; ``None`` for fp32.

    Returns:
        float32 (code_channels, ceil(D / sd), ceil(H / sh), ceil(W / sw)) on the CPU.

    Raises:
        ConfigurationError: a tile that is all halo or no multiple of the stride.
        InputError: not three axes. MemoryExhaustedError: one tile is too much.
    """
    d, h, w = code_grid(codec, hu.shape)
    code = torch.empty((codec.config.code_channels, d, h, w))
    tiles = encoder_tiles(codec, hu, tile_dhw, TileRunner(codec, batch, precision))
    for at, slab in encode_slabs(codec, hu, window, tiles):
        code[:, at] = slab
    return code


def decode_tiled(
    codec: VQCodec,
    code: Tensor,
    *,
    tile_dhw: Triple | None = None,
    batch: int = 1,
    precision: torch.dtype | None = None,
) -> Iterator[Slab]:
    """Finished slabs of the volume along depth, in order; memory does not grow with depth.

    Args:
        codec: in evaluation mode.
        code: continuous or quantised (code_channels, d, h, w); it is quantised here.
        tile_dhw: size of a window in voxels, halo included; default: what fits the memory, see `FittingTiles`.
        batch: windows at a time; halved on out-of-memory.
        precision: ``torch.bfloat16`` for autocast; ``None`` for fp32.

    Yields:
        Slice of voxels along D and float32 (slices, h * sh, w * sw): units of the HU window, not clipped
        (``HUWindow.to_hu`` clips), not cropped to a volume that was padded.

    Raises:
        ConfigurationError: a tile that is all halo or no multiple of the stride.
        InputError: not (code_channels, d, h, w). MemoryExhaustedError: one tile is too much.
    """
    if code.dim() != 4 or code.shape[0] != codec.config.code_channels or 0 in code.shape:
        raise InputError(
            f"code of shape {list(code.shape)}: this codec decodes [{codec.config.code_channels}, d, h, w]"
        )
    grid = (code.shape[1], code.shape[2], code.shape[3])
    slabs = iter([(slice(0, grid[0]), code)])
    return decode_slabs(codec, slabs, grid, decoder_tiles(codec, grid, tile_dhw, TileRunner(codec, batch, precision)))


def decode_volume(
    codec: VQCodec,
    code: Tensor,
    window: HUWindow,
    shape_dhw: Triple,
    *,
    tile_dhw: Triple | None = None,
    batch: int = 1,
    precision: torch.dtype | None = None,
) -> np.ndarray:
    """The whole volume of a code in HU, float32, cropped to ``shape_dhw``; arguments as in `decode_tiled`.

    Raises:
        InputError: the code is not that of such a volume; else as `decode_tiled`.
    """
    if tuple(code.shape[1:]) != code_grid(codec, shape_dhw):
        raise InputError(
            f"code grid {list(code.shape[1:])} is not that of a volume of {list(shape_dhw)} voxels [D, H, W]"
        )
    hu = np.empty(shape_dhw, np.float32)
    for at, slab in decode_tiled(codec, code, tile_dhw=tile_dhw, batch=batch, precision=precision):
        hu[at] = window.to_hu(slab[: shape_dhw[0] - at.start, : shape_dhw[1], : shape_dhw[2]])
    return hu


def code_grid(codec: VQCodec, shape_dhw: tuple[int, ...]) -> Triple:
    """Size of the latent grid of a volume: its shape over the total stride, rounded up.

    Raises:
        InputError: not three axes, or an empty one.
    """
    if len(shape_dhw) != 3 or min(shape_dhw) < 1:
        raise InputError(f"a volume of shape {list(shape_dhw)}: three axes [D, H, W] with voxels are needed")
    d, h, w = (-(-length // stride) for length, stride in zip(shape_dhw, codec.config.total_stride, strict=True))
    return d, h, w


def encoder_tiles(codec: VQCodec, hu: HUArray, tile_dhw: Triple | None, runner: TileRunner) -> FittingTiles:
    """The tiles in which a volume is encoded."""
    d, h, w = hu.shape
    return FittingTiles(codec.config, codec.config.receptive_halo_vox()[0], (d, h, w), tile_dhw, runner)


def decoder_tiles(codec: VQCodec, grid: Triple, tile_dhw: Triple | None, runner: TileRunner) -> FittingTiles:
    """The tiles in which a code of that grid (d, h, w) is decoded."""
    d, h, w = (cells * step for cells, step in zip(grid, codec.config.total_stride, strict=True))
    return FittingTiles(codec.config, codec.config.receptive_halo_vox()[1], (d, h, w), tile_dhw, runner)


def read_rows(hu: HUArray, tiling: HaloTiling, start: int = 0) -> Iterator[tuple[list[HaloTile], np.ndarray]]:
    """The tiles of each depth with the slices they look at, (window depth, padded H, padded W), padded with air.

    ``start``: as in `HaloTiling.rows`.
    """
    for row in tiling.rows(start):
        depth = row[0].window[0]
        yield row, read_padded(hu, depth, tiling.padded_dhw)


def read_padded(hu: HUArray, depth: slice, padded_dhw: Triple) -> np.ndarray:
    """Slices ``depth`` of a volume, padded with air at the end of each axis."""
    slices = np.asarray(hu[depth.start : min(depth.stop, hu.shape[0])])
    wanted = (depth.stop - depth.start, *padded_dhw[1:])
    if slices.shape == wanted:
        return slices
    padded = np.full(wanted, HU_AIR, slices.dtype)
    padded[tuple(slice(0, length) for length in slices.shape)] = slices
    return padded


def encode_slabs(
    codec: VQCodec,
    hu: HUArray,
    window: HUWindow,
    tiles: FittingTiles,
    ahead: Callable[[Iterator[tuple[list[HaloTile], np.ndarray]]], Iterator[tuple[list[HaloTile], np.ndarray]]] = iter,
) -> Iterator[CodeSlab]:
    """Finished slabs of code along depth: slice of latent rows and float32 (code_channels, rows, h, w) on the CPU.

    ``ahead`` may move the reading to a thread; everything else as in `encode_tiled`.
    """
    done, depth = 0, tiles.tiling.padded_dhw[0]
    while done < depth:
        for row, slices in ahead(read_rows(hu, tiles.tiling, done)):
            slab = tiles.attempt(_encode_row, codec, window, tiles.runner, row, slices)
            if slab is None:
                break  # again from here, by smaller tiles
            yield _cells(row[0].keep, codec.config.total_stride)[0], slab
            done = row[0].keep[0].stop


def _encode_row(
    codec: VQCodec, window: HUWindow, runner: TileRunner, row: list[HaloTile], slices: np.ndarray
) -> Tensor:
    """The code that a row of tiles completes, float32 (code_channels, rows, h, w), from its slices (depth, H, W)."""

    def load(tile: HaloTile) -> Tensor:
        part = np.ascontiguousarray(slices[:, tile.window[1], tile.window[2]])
        return window.to_unit(torch.from_numpy(part).to(runner.device))[None]  # (1, D, H, W)

    stride = codec.config.total_stride
    depth = _cells(row[0].keep, stride)[0]
    plane = (length // step for length, step in zip(slices.shape[1:], stride[1:], strict=True))
    slab = torch.empty((codec.config.code_channels, depth.stop - depth.start, *plane))
    for tile, code in runner.map(codec.encode, row, load):
        at = _cells(tile.keep, stride)
        slab[:, :, at[1], at[2]] = code[(slice(None), *_cells(tile.inner, stride))].float().cpu()
        del code  # a view of its batch, which would be held while the next is computed
    return slab


def decode_slabs(codec: VQCodec, slabs: Iterator[CodeSlab], grid: Triple, tiles: FittingTiles) -> Iterator[Slab]:
    """As `decode_tiled`, from slabs of code that arrive in order along depth; only those in sight are held."""
    stride = codec.config.total_stride
    held, first = torch.empty((codec.config.code_channels, 0, *grid[1:])), 0
    done, depth = 0, tiles.tiling.padded_dhw[0]
    while done < depth:
        for row in tiles.tiling.rows(done):
            seen, keep = _cells(row[0].window, stride)[0], row[0].keep[0]
            held, first = held[:, seen.start - first :], seen.start
            while first + held.shape[1] < seen.stop:
                held = torch.cat([held, next(slabs)[1]], dim=1)
            slab = tiles.attempt(_decode_row, codec, tiles.runner, row, held[:, : seen.stop - first])
            if slab is None:
                break  # again from here, by smaller tiles
            yield keep, slab
            done = keep.stop


def _decode_row(codec: VQCodec, runner: TileRunner, row: list[HaloTile], code: Tensor) -> np.ndarray:
    """The slices that a row of tiles completes, float32 (depth, H, W), from the rows of code that it looks at."""
    stride = codec.config.total_stride

    def load(tile: HaloTile) -> Tensor:
        at = _cells(tile.window, stride)
        return code[:, :, at[1], at[2]]  # (C, d, h, w)

    keep = row[0].keep[0]
    height, width = (cells * step for cells, step in zip(code.shape[2:], stride[1:], strict=True))
    slab = np.empty((keep.stop - keep.start, height, width), np.float32)
    target = torch.from_numpy(slab)
    for tile, volume in runner.map(codec.decode, row, load):
        target[:, tile.keep[1], tile.keep[2]] = volume[(0, *tile.inner)].float().cpu()
        del volume  # as above
    return slab


def _cells(voxels: Slices, stride: Triple) -> Slices:
    return tuple(slice(part.start // step, part.stop // step) for part, step in zip(voxels, stride, strict=True))
