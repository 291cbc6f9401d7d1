"""Run a codec on many tiles: in batches and sizes that fit the memory, in a chosen precision, on the codec's device."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from dataset.tiling import HaloTiling, Triple
from errors import MemoryExhaustedError, is_out_of_memory
from vq_gan_3d.codec import CodecConfig, VQCodec

Item = TypeVar("Item")
Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")
logger = logging.getLogger(__name__)

# For the features of one tile, at most. Halos make small tiles dear: 1 GiB costs the default codec 3.1 times the work
# of a 604×512×512 volume, 8 GiB 1.32 times. 16 GiB and all beyond cost 1.27 times, so a larger GPU need not be filled.
_BUDGET_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}
_LEAST_BUDGET_BYTES = 1 << 26  # a tile is not made smaller than this before memory counts as exhausted
_EDGES_VOX = (32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 512, 640)
# Live feature maps of the widest level at once: input, norm, convolution, activation, sum, and what a kernel reorders.
# On the CPU (2026-11-23, two codecs, 64×128×128) resident memory rose by 0.75 to 1.3 times the estimate.
_LIVE_MAPS = 6
# A row of tiles fills a slab of the whole plane in float32, and three are held: one is written, one waits, one grows.
# 192 slices of 512×512, so that memory does not follow depth where whole columns would fit as tiles.
_SLAB_BYTES = 3 << 26
_DEEP_VOX = 604  # slices of a thorax at full clinical resolution


class TileRunner:
    """Applies functions of a codec to tiles of one size, batch by batch, without gradient.

    On out-of-memory the batch is halved and the same tiles are run again; it stays halved. Tiles do not meet within a
    batch (the codec has no statistics over it), so the result is that of any other batch. On CUDA fp32 is fp32: torch's
    default for convolutions there is TF32, which has ten bits of mantissa.

    Args:
        codec: in evaluation mode.
        batch: tiles at a time.
        precision: ``torch.bfloat16`` runs under autocast; ``None`` as the weights are.

    Attributes:
        batch: the present batch.
        tiles: how many were run.
    """

    def __init__(self, codec: VQCodec, batch: int = 1, precision: torch.dtype | None = None) -> None:
        if codec.training:
            raise ValueError("the codec is in training mode, where it follows its input: call eval() first")
        self.device = next(codec.parameters()).device
        self.batch = max(1, batch)
        self.precision = precision
        self.tiles = 0

    def map(
        self, function: Callable[[Tensor], Tensor], items: Sequence[Item], load: Callable[[Item], Tensor]
    ) -> Iterator[tuple[Item, Tensor]]:
        """Results of ``function`` (B, ...) in the order of ``items``, one item at a time, on the device.

        Args:
            function: takes and gives a batch.
            items: what to run.
            load: makes the input of one item, without the batch axis, on any device.

        Raises:
            MemoryExhaustedError: a single tile does not fit.
        """
        done = 0
        while done < len(items):
            part = items[done : done + self.batch]
            results = self._attempt(function, part, load)
            if results is None:
                if len(part) == 1:
                    raise MemoryExhaustedError(
                        f"{self.device}: no memory for one tile: choose a smaller tile or a device with more"
                    )
                self.batch = len(part) // 2
                logger.warning(
                    "%s is out of memory with %d at once: going on with %d", self.device, len(part), self.batch
                )
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            for number, item in enumerate(part):
                yield item, results[number]
            del results  # or it would be held while the next batch needs the memory
            done += len(part)
            self.tiles += len(part)

    @torch.inference_mode()
    def _attempt(
        self, function: Callable[[Tensor], Tensor], part: Sequence[Item], load: Callable[[Item], Tensor]
    ) -> Tensor | None:
        """Run a batch; ``None`` on out-of-memory (the traceback, which holds the tensors, ends with this call)."""
        try:
            inputs = torch.stack([load(item).to(self.device, non_blocking=True) for item in part])
            with computing_in(self.precision, self.device):
                return function(inputs)
        except Exception as error:
            if is_out_of_memory(error):
                return None
            raise


class FittingTiles:
    """The halo tiles of a volume: of a size that was asked for, or as large as the memory allows.

    With halo tiles of any size the result is the same, so a volume that was begun with one size goes on with a smaller
    one where a tile of the first turns out not to fit.

    Args:
        config: of the codec.
        halo_dhw: how far its encoder or decoder looks, in voxels.
        shape_dhw: of the volume.
        tile_dhw: of a tile, halo included; None: `default_tile` for `tile_budget`, halved on out-of-memory.
        runner: what will run the tiles.

    Attributes:
        tiling: the present one.

    Raises:
        ConfigurationError: as `HaloTiling`.
    """

    def __init__(
        self, config: CodecConfig, halo_dhw: Triple, shape_dhw: Triple, tile_dhw: Triple | None, runner: TileRunner
    ) -> None:
        self.runner = runner
        self._config, self._halo, self._shape = config, halo_dhw, shape_dhw
        self._budget = tile_budget(runner.device) if tile_dhw is None else 0
        self.tiling = self._tiling(tile_dhw)

    def attempt(
        self, compute: Callable[Arguments, Result], *arguments: Arguments.args, **named: Arguments.kwargs
    ) -> Result | None:
        """What ``compute`` returns; ``None`` where a tile did not fit: `tiling` has smaller tiles now.

        Raises:
            MemoryExhaustedError: the size was asked for, or is the least already.
        """
        try:
            return compute(*arguments, **named)
        except MemoryExhaustedError:
            if self._budget <= _LEAST_BUDGET_BYTES:
                raise
        self._budget //= 2
        self.tiling = self._tiling(None)
        device = self.runner.device
        logger.warning("%s is out of memory: going on with tiles of %s voxels", device, list(self.tiling.window_dhw))
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _tiling(self, tile: Triple | None) -> HaloTiling:
        if tile is None:
            tile = default_tile(self._config, self._halo, self._shape, self._budget, self.runner.precision)
        return HaloTiling(self._shape, tile, self._halo, self._config.total_stride)


@contextmanager
def computing_in(precision: torch.dtype | None, device: torch.device) -> Iterator[None]:
    """Autocast to ``precision``; for ``None`` fp32 throughout, convolutions on CUDA included."""
    if precision is not None:
        with torch.autocast(device.type, precision):
            yield
        return
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # missing in the stubs
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before


def free_bytes(device: torch.device) -> int:
    """Memory of a CUDA device that new tensors can have: what nobody holds, and what torch holds for reuse."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def tile_budget(device: torch.device) -> int:
    """Memory for one tile in bytes: on CUDA at most half of what is free.

    That half is rounded down to a power of two: a few MB that another process holds must not cut a volume otherwise.
    """
    most = _BUDGET_BYTES.get(device.type, _BUDGET_BYTES["cpu"])
    if device.type != "cuda":
        return most
    return min(most, max(_LEAST_BUDGET_BYTES, 1 << max(0, (free_bytes(device) // 2).bit_length() - 1)))


def tile_bytes(config: CodecConfig, tile_dhw: Triple, precision: torch.dtype | None = None) -> int:
    """Memory that encoding or decoding one tile takes, in bytes: an estimate from the widest features."""
    pitch, widest = 1, 0.0
    for width, stride in zip(config.widths, config.strides, strict=True):
        pitch *= prod(stride)
        widest = max(widest, width / pitch)
    size = 2 if precision in (torch.bfloat16, torch.float16) else 4
    return int(prod(tile_dhw) * (_LIVE_MAPS * widest * size + 8))  # and the volume itself, in and out


def default_tile(
    config: CodecConfig, halo_dhw: Triple, shape_dhw: Triple, budget_bytes: float, precision: torch.dtype | None = None
) -> Triple:
    """The window [D, H, W], halo included, that computes the fewest voxels within a budget of memory for one tile.

    Its depth is also bounded by what a slab of the whole plane takes, and volumes deeper than 604 slices take the tile
    of 604, so that memory does not grow with depth. Depends on nothing but its arguments.
    """
    stride = config.total_stride
    shape_dhw = (min(shape_dhw[0], _DEEP_VOX), *shape_dhw[1:])
    best: tuple[float, Triple] | None = None
    for d, plane in itertools.product(_EDGES_VOX, _EDGES_VOX):
        tile = tuple(-(-edge // s) * s for edge, s in zip((d, plane, plane), stride, strict=True))
        tiling = _tiling(shape_dhw, (tile[0], tile[1], tile[2]), halo_dhw, stride)
        if tiling is None:
            continue
        size = tile_bytes(config, tiling.window_dhw, precision)
        fits = size <= budget_bytes and 4 * prod((tiling.window_dhw[0], *shape_dhw[1:])) <= _SLAB_BYTES
        # over budget (a halo too wide for it) the smallest wins, within it the least work
        cost = float(len(tiling) * prod(tiling.window_dhw)) if fits else 1e18 * size
        if best is None or cost < best[0]:
            best = cost, tiling.tile_dhw
    assert best is not None  # the longest edge exceeds any codec's halo
    return best[1]


def _tiling(shape: Triple, tile: Triple, halo: Triple, stride: Triple) -> HaloTiling | None:
    if any(t < 2 * (-(-h // s) * s) + s for t, h, s in zip(tile, halo, stride, strict=True)):
        return None
    return HaloTiling(shape, tile, halo, stride)
