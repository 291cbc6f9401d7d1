"""Encode and decode a volume of any size tile by tile, with the result of the whole volume at once.

The codec is local: a latent depends on its own cell and a halo around it (`CodecConfig.receptive_halo_vox`), a voxel on
its own latent and a halo of latents. A window that holds the halo gives the inside exactly (to fp32 rounding, which
depends on how a kernel splits its sums), and a window at the border of the volume meets the same zero padding. Nothing
is blended, the latents are one seamless grid whatever the tiles, and finished slabs leave along depth, so that memory
does not grow with it.
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
from vq_gan_3d.tiled_batches import TileRunner, default_tile

# For the features of one tile. Halos make small tiles dear: 1 GiB costs the default codec 3.1 times a volume's work.
TILE_BUDGET_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}


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
        tile_dhw: size of a window, halo included; default `default_tile` for `TILE_BUDGET_BYTES`.
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
    for at, slab in encode_slabs(codec, hu, window, tile_dhw=tile_dhw, runner=TileRunner(codec, batch, precision)):
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
        tile_dhw: size of a window in voxels, halo included; default `default_tile` for `TILE_BUDGET_BYTES`.
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
    return decode_slabs(codec, slabs, grid, tile_dhw=tile_dhw, runner=TileRunner(codec, batch, precision))


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


def read_rows(hu: HUArray, tiling: HaloTiling) -> Iterator[tuple[list[HaloTile], np.ndarray]]:
    """The tiles of each depth with the slices they look at, (window depth, padded H, padded W), padded with air."""
    for row in tiling.rows():
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
    *,
    tile_dhw: Triple | None,
    runner: TileRunner,
    ahead: Callable[[Iterator[tuple[list[HaloTile], np.ndarray]]], Iterator[tuple[list[HaloTile], np.ndarray]]] = iter,
) -> Iterator[CodeSlab]:
    """Finished slabs of code along depth: slice of latent rows and float32 (code_channels, rows, h, w) on the CPU.

    ``ahead`` may move the reading to a thread; everything else as in `encode_tiled`.
    """
    config = codec.config
    _, h, w = code_grid(codec, hu.shape)
    shape = (hu.shape[0], hu.shape[1], hu.shape[2])
    halo = config.receptive_halo_vox()[0]
    window_dhw = tile_dhw or default_tile(config, halo, shape, tile_budget(runner), runner.precision)
    tiling = HaloTiling(shape, window_dhw, halo, config.total_stride)

    for row, slices in ahead(read_rows(hu, tiling)):

        def load(tile: HaloTile, slices: np.ndarray = slices) -> Tensor:
            part = np.ascontiguousarray(slices[:, tile.window[1], tile.window[2]])
            return window.to_unit(torch.from_numpy(part).to(runner.device))[None]  # (1, D, H, W)

        rows = _cells(row[0].keep, config.total_stride)[0]
        slab = torch.empty((config.code_channels, rows.stop - rows.start, h, w))
        for tile, code in runner.map(codec.encode, row, load):
            at = _cells(tile.keep, config.total_stride)
            slab[:, :, at[1], at[2]] = code[(slice(None), *_cells(tile.inner, config.total_stride))].float().cpu()
        yield rows, slab


def decode_slabs(
    codec: VQCodec,
    slabs: Iterator[CodeSlab],
    grid: Triple,
    *,
    tile_dhw: Triple | None,
    runner: TileRunner,
) -> Iterator[Slab]:
    """As `decode_tiled`, from slabs of code that arrive in order along depth; only those in sight are held."""
    config = codec.config
    stride = config.total_stride
    halo = config.receptive_halo_vox()[1]
    shape = (grid[0] * stride[0], grid[1] * stride[1], grid[2] * stride[2])
    window_dhw = tile_dhw or default_tile(config, halo, shape, tile_budget(runner), runner.precision)
    tiling = HaloTiling(shape, window_dhw, halo, stride)
    held, first = torch.empty((config.code_channels, 0, *grid[1:])), 0
    for row in tiling.rows():
        depth = _cells(row[0].window, stride)[0]
        held, first = held[:, depth.start - first :], depth.start
        while first + held.shape[1] < depth.stop:
            held = torch.cat([held, next(slabs)[1]], dim=1)

        def load(tile: HaloTile, code: Tensor = held[:, : depth.stop - first]) -> Tensor:
            at = _cells(tile.window, stride)
            return code[:, :, at[1], at[2]]  # (C, d, h, w)

        keep = row[0].keep[0]
        slab = np.empty((keep.stop - keep.start, *shape[1:]), np.float32)
        target = torch.from_numpy(slab)
        for tile, volume in runner.map(codec.decode, row, load):
            target[:, tile.keep[1], tile.keep[2]] = volume[(0, *tile.inner)].float().cpu()
        yield keep, slab


def tile_budget(runner: TileRunner) -> int:
    """Memory for one tile on the runner's kind of device, in bytes."""
    return TILE_BUDGET_BYTES.get(runner.device.type, TILE_BUDGET_BYTES["cpu"])


def _cells(voxels: Slices, stride: Triple) -> Slices:
    return tuple(slice(part.start // step, part.stop // step) for part, step in zip(voxels, stride, strict=True))
