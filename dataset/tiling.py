"""Tiles that cover a volume of any size, as pure geometry: starts and sizes in voxels, no arrays.

Tile starts are multiples of the codec's total stride, so that the latent grids of neighbouring tiles coincide. The
volume is padded at the end of each axis (with air) to a multiple of that stride, at least to one tile, and cropped
after stitching. The last tile of an axis is moved back inside, so that no tile reaches beyond the padded volume:
512×512×604 voxels (W×H×D) in tiles of 256×256×128 with 25 % overlap are 3×3×6 = 54 tiles.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from errors import ConfigurationError

Triple = tuple[int, int, int]
Borders = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Tiling:
    """How a volume is cut; iterating gives the start (d, h, w) of every tile, W fastest.

    Args:
        shape_dhw: of the volume; may be smaller than a tile.
        tile_dhw: of each tile; multiples of ``stride_dhw``.
        overlap: share of a tile that neighbours have in common at least, in [0, 1).
        stride_dhw: total stride of the codec (voxels per latent cell).

    Raises:
        ConfigurationError: sizes that are not positive, a tile that is no multiple of the stride, or the overlap.
    """

    shape_dhw: Triple
    tile_dhw: Triple
    overlap: float = 0.25
    stride_dhw: Triple = (1, 1, 1)

    def __post_init__(self) -> None:
        for name in ("shape_dhw", "tile_dhw", "stride_dhw"):
            sizes = getattr(self, name)
            if len(sizes) != 3 or min(sizes) < 1:
                raise ConfigurationError(f"tiling: {name}={list(sizes)}: three positive numbers [D, H, W] are needed")
        if not 0 <= self.overlap < 1:
            raise ConfigurationError(f"tiling: overlap={self.overlap}: a share of the tile in [0, 1) is needed")
        if any(tile % stride for tile, stride in zip(self.tile_dhw, self.stride_dhw, strict=True)):
            raise ConfigurationError(
                f"tiling: a tile of {list(self.tile_dhw)} is no multiple of the codec's total stride "
                f"{list(self.stride_dhw)}: choose a tile [D, H, W] that is"
            )

    @cached_property
    def padded_dhw(self) -> Triple:
        """Size of the padded volume; the tiles cover exactly this."""
        d, h, w = (
            max(round_up(length, stride), tile)
            for length, tile, stride in zip(self.shape_dhw, self.tile_dhw, self.stride_dhw, strict=True)
        )
        return d, h, w

    @cached_property
    def starts(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Starts along D, H and W, rising."""
        d, h, w = (
            _axis_starts(length, tile, _step(tile, self.overlap, stride))
            for length, tile, stride in zip(self.padded_dhw, self.tile_dhw, self.stride_dhw, strict=True)
        )
        return d, h, w

    @property
    def borders(self) -> Borders:
        """Where tiles begin or end inside the volume, along D, H and W: the voxel behind the face."""
        d, h, w = (
            tuple(sorted({at for start in line for at in (start, start + tile) if 0 < at < length}))
            for line, tile, length in zip(self.starts, self.tile_dhw, self.shape_dhw, strict=True)
        )
        return d, h, w

    def own(self, start_dhw: Triple) -> tuple[slice, slice, slice]:
        """What the tile at ``start_dhw`` answers for, in voxels from its start: overlaps are halved at whole strides.

        The own parts of all tiles fill the volume, padded to the stride, once.
        """
        d, h, w = (
            _own(line, tile, start, round_up(length, stride), stride)
            for line, tile, start, length, stride in zip(
                self.starts, self.tile_dhw, start_dhw, self.shape_dhw, self.stride_dhw, strict=True
            )
        )
        return d, h, w

    @property
    def counts(self) -> Triple:
        """Tiles along D, H and W."""
        d, h, w = self.starts
        return len(d), len(h), len(w)

    def __len__(self) -> int:
        return math.prod(self.counts)

    def __iter__(self) -> Iterator[Triple]:
        yield from itertools.product(*self.starts)


class HaloTile(NamedTuple):
    """One tile of a `HaloTiling`, in voxels of the padded volume; for each axis D, H, W.

    Attributes:
        window: what is read, halo included.
        keep: what is exact in the result of the window and is kept; the kept parts of all tiles fill the volume once.
    """

    window: tuple[slice, slice, slice]
    keep: tuple[slice, slice, slice]

    @property
    def inner(self) -> tuple[slice, slice, slice]:
        """``keep`` counted from the start of the window."""
        d, h, w = (slice(k.start - a.start, k.stop - a.start) for k, a in zip(self.keep, self.window, strict=True))
        return d, h, w


@dataclass(frozen=True)
class HaloTiling:
    """Windows of one size whose results, less a halo on the sides that lie inside the volume, tile it exactly.

    A window at the border of the volume has no halo there: what a network pads with zeros beyond the volume it pads
    beyond that window too.

    Args:
        shape_dhw: of the volume.
        tile_dhw: of a window, halo included; cut to the padded volume where that is smaller.
        halo_dhw: how far the network looks, in voxels; rounded up to the stride.
        stride_dhw: total stride of the codec.

    Raises:
        ConfigurationError: sizes that are not positive, or a tile that is all halo.
    """

    shape_dhw: Triple
    tile_dhw: Triple
    halo_dhw: Triple
    stride_dhw: Triple = (1, 1, 1)

    def __post_init__(self) -> None:
        Tiling(self.shape_dhw, self.tile_dhw, 0.0, self.stride_dhw)  # checks all but the halo
        for padded, tile, halo, stride in zip(
            self.padded_dhw, self.tile_dhw, self.halo_dhw, self.stride_dhw, strict=True
        ):
            if tile < padded and tile < 2 * round_up(halo, stride) + stride:
                least = [2 * round_up(h, s) + s for h, s in zip(self.halo_dhw, self.stride_dhw, strict=True)]
                raise ConfigurationError(
                    f"tiling: a tile of {list(self.tile_dhw)} has nothing inside its halo of {list(self.halo_dhw)} "
                    f"voxels: use at least {least} [D, H, W]"
                )

    @cached_property
    def padded_dhw(self) -> Triple:
        """Size of the volume padded to the stride."""
        d, h, w = (round_up(length, stride) for length, stride in zip(self.shape_dhw, self.stride_dhw, strict=True))
        return d, h, w

    @cached_property
    def axes(self) -> tuple[list[tuple[slice, slice]], ...]:
        """For each axis the windows and what is kept of them, rising."""
        return tuple(
            _halo_axis(length, min(tile, length), round_up(halo, stride))
            for length, tile, halo, stride in zip(
                self.padded_dhw, self.tile_dhw, self.halo_dhw, self.stride_dhw, strict=True
            )
        )

    @property
    def borders(self) -> Borders:
        """Where kept parts meet inside the volume, along D, H and W: the voxel behind the face."""
        d, h, w = (
            tuple(keep.start for _, keep in axis if 0 < keep.start < length)
            for axis, length in zip(self.axes, self.shape_dhw, strict=True)
        )
        return d, h, w

    @property
    def window_dhw(self) -> Triple:
        """Size of every window."""
        d, h, w = (min(tile, length) for tile, length in zip(self.tile_dhw, self.padded_dhw, strict=True))
        return d, h, w

    def __len__(self) -> int:
        return math.prod(len(axis) for axis in self.axes)

    def __iter__(self) -> Iterator[HaloTile]:
        for row in self.rows():
            yield from row

    def rows(self, start: int = 0) -> Iterator[list[HaloTile]]:
        """The tiles of one depth at a time; each row completes its kept slices.

        Args:
            start: slices before it, a multiple of the stride, are done (by other tiles, as it may be): the first row
                keeps what follows, and begins a halo before it. Its windows may be less deep than the tile.
        """
        halo = round_up(self.halo_dhw[0], self.stride_dhw[0])
        above = max(0, start - halo)
        length = self.padded_dhw[0] - above
        for window, keep in _halo_axis(length, min(self.tile_dhw[0], length), halo):
            depth = (
                slice(above + window.start, above + window.stop),
                slice(max(start, above + keep.start), above + keep.stop),
            )
            yield [
                HaloTile(*zip(depth, height, width, strict=True)) for height, width in itertools.product(*self.axes[1:])
            ]


def round_up(length: int, multiple: int) -> int:
    """The smallest multiple that is not below ``length``."""
    return -(-length // multiple) * multiple


def crop_slices(shape_dhw: Sequence[int]) -> tuple[slice, ...]:
    """What to keep of a stitched, padded volume."""
    return tuple(slice(0, length) for length in shape_dhw)


def _step(tile: int, overlap: float, stride: int) -> int:
    # the tolerance: 100 × (1 - 0.1) is 90.00000000000001 or 89.99999999999999, by the rounding of the day
    return max(stride, math.floor(tile * (1 - overlap) / stride + 1e-9) * stride)


def _axis_starts(length: int, tile: int, step: int) -> tuple[int, ...]:
    """Every ``step`` voxels, the last one moved back to end at ``length``."""
    count = 1 + math.ceil((length - tile) / step)
    return (*range(0, (count - 1) * step, step), length - tile)


def _own(starts: Sequence[int], tile: int, start: int, limit: int, stride: int) -> slice:
    """What the tile at ``start`` answers for along an axis, from middle to middle of its overlaps, from its start."""
    place = starts.index(start)
    middles = [(a + tile + b) // 2 // stride * stride for a, b in itertools.pairwise(starts)]
    first, last = ([0, *middles][place], [*middles, limit][place])
    return slice(first - start, last - start)


def _halo_axis(length: int, tile: int, halo: int) -> list[tuple[slice, slice]]:
    if tile == length:
        return [(slice(0, length), slice(0, length))]
    starts = _axis_starts(length, tile, tile - 2 * halo)
    cuts = [0, *(start + halo for start in starts[1:]), length]
    return [(slice(a, a + tile), slice(*cut)) for a, cut in zip(starts, itertools.pairwise(cuts), strict=True)]
