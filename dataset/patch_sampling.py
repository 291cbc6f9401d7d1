"""Where training patches are taken: at random, with a share of them centred in the body.

A third to a half of a chest CT is air around the patient, in which a codec learns nothing. ``dataset.tissue_bias`` is
the share of patches whose centre is drawn from the body, lungs included; the others are uniform, so that air and the
table are seen as well.

There is no flip. A left-right flip makes situs inversus: heart, aortic arch and liver on the wrong side, which the
X-ray of the same patient contradicts. Front-back and head-foot flips turn spine, table and gravity (fluid and vessels
fill downwards) around. Each would also teach the codec structures that a sound volume never holds, while random
positions already give more patches than a run can see.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from errors import InputError


@dataclass(frozen=True, eq=False)
class BodyMap:
    """Coarse map of the body: which cells of ``cell_vox`` voxels hold it.

    Args:
        cells: (n, 3) cell indices (d, h, w) of the body.
        cell_vox: size of a cell.
        shape: voxels (D, H, W) of the volume.
        offset_vox: first voxel of cell (0, 0, 0).
    """

    cells: np.ndarray
    cell_vox: tuple[int, int, int]
    shape: tuple[int, int, int]
    offset_vox: tuple[int, int, int] = (0, 0, 0)

    def draw(self, rng: np.random.Generator) -> tuple[int, int, int]:
        """A voxel (d, h, w) of the body: a random cell and a random voxel in it."""
        cell = self.cells[int(rng.integers(len(self.cells)))]
        d, h, w = (
            min(int(index) * size + offset + int(rng.integers(size)), length - 1)
            for index, size, offset, length in zip(cell, self.cell_vox, self.offset_vox, self.shape, strict=True)
        )
        return d, h, w


def read_body(metadata: dict[str, Any], shape: Sequence[int]) -> BodyMap | None:
    """The body from a store's metadata: its map, else its bounding box, else None.

    Raises:
        InputError: the entry does not fit the volume.
    """
    entry = metadata.get("body")
    if entry is None:
        return None
    try:
        d, h, w = shape
        if "map" in entry:
            grid, cell = (tuple(int(n) for n in entry["map"][key]) for key in ("cells", "cell_vox"))
            fits = all(
                size > 0 and math.ceil(length / size) == count
                for length, size, count in zip(shape, cell, grid, strict=True)
            )
            if not fits:
                raise ValueError(f"a map of {list(grid)} cells of {list(cell)}")
            count = math.prod(grid)
            # bounded: what a bomb would add is never unpacked
            packed = zlib.decompressobj().decompress(base64.b64decode(entry["map"]["bits"]), math.ceil(count / 8))
            bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=count)
            cells = np.argwhere(bits.reshape(grid))
            offset = (0, 0, 0)
        else:
            start, stop = np.array(entry["bounding_box_vox"], dtype=np.int64).reshape(2, 3)
            if (start < 0).any() or (stop <= start).any() or (stop > shape).any():
                raise ValueError(f"a bounding box of {[start.tolist(), stop.tolist()]}")
            cells, cell, offset = np.zeros((1, 3), np.int64), tuple((stop - start).tolist()), tuple(start.tolist())
        if len(cells) == 0:
            raise ValueError("an empty body")
    except (KeyError, TypeError, ValueError, zlib.error) as error:
        raise InputError(f"metadata 'body' does not fit a volume of {list(shape)} ({error}): build it again") from error
    return BodyMap(cells, (cell[0], cell[1], cell[2]), (d, h, w), (offset[0], offset[1], offset[2]))


def random_start(
    shape: Sequence[int],
    patch_dhw: Sequence[int],
    rng: np.random.Generator,
    body: BodyMap | None = None,
    tissue_bias: float = 0.0,
) -> list[int]:
    """Start [d, h, w] of a random patch; on an axis shorter than the patch it is centred (negative: padded).

    Args:
        shape: voxels of the volume.
        patch_dhw: of the patch.
        rng: keyed by (seed, epoch, index); nothing else decides.
        body: where the body is; None: uniform.
        tissue_bias: probability that the patch is centred on a voxel of the body (moved inside the volume where it
            would reach beyond).
    """
    centre = None
    if tissue_bias > 0 and body is not None and rng.random() < tissue_bias:
        centre = body.draw(rng)
    start = []
    for axis, (size, patch) in enumerate(zip(shape, patch_dhw, strict=True)):
        if size <= patch:
            start.append((size - patch) // 2)
        elif centre is None:
            start.append(int(rng.integers(0, size - patch + 1)))
        else:
            start.append(min(max(centre[axis] - patch // 2, 0), size - patch))
    return start
