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

from errors import ConfigurationError

Triple = tuple[int, int, int]


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
    def counts(self) -> Triple:
        """Tiles along D, H and W."""
        d, h, w = self.starts
        return len(d), len(h), len(w)

    def __len__(self) -> int:
        return math.prod(self.counts)

    def __iter__(self) -> Iterator[Triple]:
        yield from itertools.product(*self.starts)


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
