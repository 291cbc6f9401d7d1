"""Blend overlapping tiles into one volume: exact to the bit where tiles agree, in memory that does not grow with depth.

Weights are separable, so tiles are blended along W into rows, rows along H into slabs, slabs along D into the volume.
Each step is a running weighted mean, ``mean += share * (tile - mean)`` with share = w_k / (w_1 + ... + w_k), which ends
at the weighted mean of all tiles. Where tiles agree the difference is 0, so the result is the tile to the bit, in
float32 and whatever the rounding of the weights. The shares are computed in float64, the mean itself runs in float32:
where tiles differ, it is off a mean accumulated in float64 by up to 3e-6 of the window. The other exact way, to sum
``w * tile`` in float64, took 2.4 times the processor time (2026-11-22, busy machine: 3.6 s against 1.5 s for
512×512×604 in 54 tiles).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from dataset.tiling import Tiling, Triple
from errors import ConfigurationError

Kind = Literal["linear", "cosine", "gaussian"]
Write = Callable[[int, np.ndarray], None]

_GAUSSIAN_SIGMA = 0.125  # of the tile's length, as in MONAI and nnU-Net
_WRITTEN_SLICES = 8  # handed over at a time


def blend_weights(tile: int, before: int, after: int, kind: Kind = "linear") -> np.ndarray:
    """Weights of one tile along one axis, float64 (tile,), above 0, not yet divided by their sum over the tiles.

    Args:
        tile: its length in voxels.
        before: voxels that it shares with the tile before it; 0 at the border of the volume.
        after: the same of the tile after it.
        kind: ``linear`` and ``cosine`` (raised cosine) ramps across the shared voxels, or a ``gaussian`` over the whole
            tile, sigma an eighth of it.

    Raises:
        ConfigurationError: another kind.
    """
    if kind not in get_args(Kind):
        raise ConfigurationError(f"weights={kind!r} is unknown: use {', '.join(get_args(Kind))}")
    position = np.arange(tile) + 0.5
    if kind == "gaussian":
        return np.exp(-0.5 * ((position / tile - 0.5) / _GAUSSIAN_SIGMA) ** 2)
    rise = np.minimum(1.0, position / before) if before else np.ones(tile)
    fall = np.minimum(1.0, position[::-1] / after) if after else np.ones(tile)
    ramp = np.minimum(rise, fall)
    return np.sin(0.5 * np.pi * ramp) ** 2 if kind == "cosine" else ramp


class Shared(NamedTuple):
    """The leading part of a tile along one axis that earlier tiles have filled already.

    Attributes:
        length: in voxels; what follows is new.
        share: of this tile in the mean of all so far, float32 (length,), in (0, 1).
    """

    length: int
    share: Tensor


def axis_plan(starts: tuple[int, ...], tile: int, kind: Kind) -> list[Shared]:
    """What each tile of an axis shares with those before it; neighbours' weights meet over their true overlap."""
    overlaps = [max(0, a + tile - b) for a, b in itertools.pairwise(starts)]
    total = np.zeros(starts[-1] + tile)
    plan = []
    for start, before, after in zip(starts, [0, *overlaps], [*overlaps, 0], strict=True):
        own = blend_weights(tile, before, after, kind)
        total[start : start + tile] += own
        share = own[:before] / total[start : start + before]
        plan.append(Shared(before, torch.from_numpy(share.astype(np.float32))))
    return plan


class Stitcher:
    """Takes the tiles of a tiling in its order and hands finished slices to a writer.

    Holds one slab of a tile's depth in float32, and the parts of the present tiles that others share. Voxels of a
    single tile are copied without arithmetic.

    Args:
        tiling: how the volume was cut; the result is cropped to its ``shape_dhw``.
        kind: of weights, see `blend_weights`.
        write: called with the number of the first slice and (slices, H, W) of ``dtype``, in order along depth; the
            array is used again after the call.
        dtype: of the result; integers are rounded to the nearest.

    Raises:
        ConfigurationError: an unknown kind of weights.
    """

    def __init__(
        self, tiling: Tiling, kind: Kind, write: Write, dtype: np.dtype | type[np.generic] = np.float32
    ) -> None:
        self.tiling = tiling
        self._write = write
        self._dtype = np.dtype(dtype)
        self._plans = [axis_plan(*axis, kind) for axis in zip(tiling.starts, tiling.tile_dhw, strict=True)]
        shared_depth, shared_height = (max(part.length for part in plan) for plan in self._plans[:2])
        depth, (_, padded_height, padded_width) = tiling.tile_dhw[0], tiling.padded_dhw
        self._slab = torch.empty(depth, padded_height, padded_width)
        self._first = 0  # slice of the volume that the slab begins with
        self._shared_slab = torch.empty(shared_depth, padded_height, padded_width)
        self._shared_rows = torch.empty(depth, shared_height, padded_width)
        self._due = self._order()

    def add(self, start_dhw: Triple, tile: np.ndarray | Tensor) -> None:
        """Blend one tile in.

        Args:
            start_dhw: its place, the next one of the tiling.
            tile: (d, h, w) of the tiling's size; float32, or a type whose values float32 can hold. Finite.

        Raises:
            ValueError: another tile was due, or another size.
        """
        due, index = next(self._due, (None, (0, 0, 0)))
        if due is None or due != tuple(start_dhw):
            raise ValueError(f"tile at {list(start_dhw)}: the tiling's next is {due}")
        if tuple(tile.shape) != self.tiling.tile_dhw:
            raise ValueError(f"tile of {list(tile.shape)} voxels: the tiling's are {list(self.tiling.tile_dhw)}")
        values = _as_float(tile)
        self._advance(due[0])
        along_d, along_h, along_w = (plan[i] for plan, i in zip(self._plans, index, strict=True))
        row_ends, slab_ends = (i == count - 1 for i, count in zip(index[:0:-1], self.tiling.counts[:0:-1], strict=True))

        shared_slab = self._shared_slab[: along_d.length]
        for slab, depth in (
            (shared_slab, slice(0, along_d.length)),
            (self._slab[along_d.length :], slice(along_d.length, None)),
        ):
            part, rows = values[depth], self._shared_rows[depth, : along_h.length]
            shared = slab[:, due[1] : due[1] + along_h.length]
            new = slab[:, due[1] + along_h.length : due[1] + part.shape[1]]
            _blend_along_w(rows, part[:, : along_h.length], due[2], along_w)
            _blend_along_w(new, part[:, along_h.length :], due[2], along_w)
            if row_ends:
                shared.lerp_(rows, along_h.share[:, None])
        if row_ends and slab_ends:
            self._slab[: along_d.length].lerp_(shared_slab, along_d.share[:, None, None])

    def finish(self) -> None:
        """Write the slices that are left.

        Raises:
            ValueError: tiles are missing.
        """
        due, _ = next(self._due, (None, None))
        if due is not None:
            raise ValueError(f"the tile at {list(due)} is missing")
        self._advance(self.tiling.padded_dhw[0])

    def _advance(self, start: int) -> None:
        """Write the slices before ``start`` and move what is left to the front of the slab."""
        done = start - self._first
        if done == 0:
            return
        depth, height, width = self.tiling.shape_dhw
        finished = self._slab[: min(done, depth - self._first), :height, :width]
        for block in finished.split(_WRITTEN_SLICES) if len(finished) else ():
            slices = block.numpy()
            if self._dtype.kind in "iu":
                slices = np.rint(slices)
            self._write(self._first, slices.astype(self._dtype, copy=False))
            self._first += len(slices)
        self._first = start
        for a in range(len(self._slab) - done):
            self._slab[a] = self._slab[a + done]

    def _order(self) -> Iterator[tuple[Triple, Triple]]:
        """Start and index of every tile."""
        for (i, d), (j, h), (k, w) in itertools.product(*(enumerate(starts) for starts in self.tiling.starts)):
            yield (d, h, w), (i, j, k)


def _blend_along_w(rows: Tensor, tile: Tensor, start: int, shared: Shared) -> None:
    """Put a tile (d, h, tile W) into rows (d, h, W) that hold the tiles before it."""
    middle, stop = start + shared.length, start + tile.shape[2]
    rows[..., start:middle].lerp_(tile[..., : shared.length], shared.share)
    rows[..., middle:stop].copy_(tile[..., shared.length :])


def _as_float(tile: np.ndarray | Tensor) -> Tensor:
    if isinstance(tile, np.ndarray):
        # torch has no read-only tensors, and warns of arrays that are; nothing is written here
        tile = torch.from_numpy(tile if tile.flags.writeable else tile.copy())
    return tile.detach().to("cpu", torch.float32)
