"""The stitcher alone, with a model that changes nothing: error, time and memory beside MONAI's sliding window.

python benchmarks/stitch.py [--quick] [--json FILE]

A 512×512×604 volume (W×H×D) in 54 tiles of 256×256×128 with 25 % overlap and Gaussian weights, float32. On both sides
the model copies a tile into an output that it reuses (MONAI changes what the model gives it, so a view of the input
will not do), and both make their own volume. Memory is measured in processes of their own. Beside the seconds on the
wall there are those of the processor, which suffer less from others at work. Without MONAI its columns stay empty.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from math import prod

import numpy as np
import torch

from benchmarks.harness import Row, medians, print_table, standard_parser, time_interleaved, write_report
from benchmarks.memory import peak_rss_of
from dataset.tiling import Tiling, Triple
from patchwise_512x512x604.utils.patch_utils import Stitcher

SHAPE_DHW: Triple = (604, 512, 512)
TILE_DHW: Triple = (128, 256, 256)
QUICK_SHAPE_DHW: Triple = (75, 128, 128)
QUICK_TILE_DHW: Triple = (32, 64, 64)
OVERLAP = 0.25
MEGABYTE = 1e6
Stitch = Callable[[np.ndarray, Triple], np.ndarray]
Figures = dict[str, float]


def random_volume(shape: Triple) -> np.ndarray:
    """Float32 (D, H, W), normal in places and in size like HU."""
    volume = np.random.default_rng(0).standard_normal(shape, np.float32)
    volume *= 300
    return volume


def identity(tile: Triple) -> Callable[[torch.Tensor], torch.Tensor]:
    """A model that changes nothing, with an output of its own that it reuses: (..., d, h, w) -> the same."""
    output = torch.empty(tile)

    def model(x: torch.Tensor) -> torch.Tensor:
        return output.view(x.shape).copy_(x)

    return model


def stitch(volume: np.ndarray, tile: Triple) -> np.ndarray:
    """Cut and put together again; returns a new volume."""
    depth, height, width = volume.shape
    tiling = Tiling((depth, height, width), tile, OVERLAP)
    result = np.empty(tiling.shape_dhw, np.float32)
    whole, model = torch.from_numpy(volume), identity(tile)

    def write(first: int, slices: np.ndarray) -> None:
        result[first : first + len(slices)] = slices

    stitcher = Stitcher(tiling, "gaussian", write)
    for d, h, w in tiling:
        stitcher.add((d, h, w), model(whole[d : d + tile[0], h : h + tile[1], w : w + tile[2]]))
    stitcher.finish()
    return result


def monai_stitch(volume: np.ndarray, tile: Triple) -> np.ndarray:
    """The same by MONAI."""
    from monai.inferers.utils import sliding_window_inference

    whole = torch.from_numpy(volume)[None, None]  # (1, 1, D, H, W)
    result = sliding_window_inference(whole, tile, 1, identity(tile), overlap=OVERLAP, mode="gaussian")
    assert isinstance(result, torch.Tensor)
    return result[0, 0].numpy()


def prepare(name: str, shape: Triple, tile: Triple) -> Callable[[], object]:
    """For `peak_rss_of`: the input is the baseline; the output belongs to the step."""
    function: Stitch = {"ours": stitch, "MONAI": monai_stitch}[name]
    volume = random_volume(shape)
    small = random_volume((8, 8, 8))
    function(small, (4, 4, 4))  # imports and the like are no work
    return lambda: function(volume, tile)


def measure(functions: Mapping[str, Stitch], shape: Triple, tile: Triple, rounds: int) -> tuple[Figures, ...]:
    """Largest error, seconds on the wall and of the processor, by name."""
    volume = random_volume(shape)
    errors = {name: float(np.abs(function(volume, tile) - volume).max()) for name, function in functions.items()}
    processor: dict[str, list[float]] = {name: [] for name in functions}

    def step(name: str) -> Callable[[], None]:
        def run() -> None:
            start = time.process_time()
            functions[name](volume, tile)
            processor[name].append(time.process_time() - start)

        return run

    wall = medians(time_interleaved({name: step(name) for name in functions}, rounds, warmup=0))
    return errors, wall, medians(processor)


def main() -> None:
    """Measure, print, write."""
    arguments = standard_parser(__doc__ or "").parse_args()
    shape, tile, rounds = (QUICK_SHAPE_DHW, QUICK_TILE_DHW, 3) if arguments.quick else (SHAPE_DHW, TILE_DHW, 5)
    functions: dict[str, Stitch] = {"ours": stitch}
    if find_spec("monai") is not None:
        functions["MONAI"] = monai_stitch
    errors, wall, processor = measure(functions, shape, tile, rounds)
    output = 4 * prod(shape)
    above = {name: (peak_rss_of(prepare, name, shape, tile) - output) / MEGABYTE for name in functions}

    def row(what: str, values: Mapping[str, float], unit: str) -> Row:
        reference = values.get("MONAI")
        return (
            Row(what, values["ours"], unit)
            if reference is None
            else Row.compared(what, values["ours"], unit, reference)
        )

    rows = [
        row("error", errors, "HU"),
        row("time: MONAI over ours", wall, "s"),
        row("processor time: MONAI over ours", processor, "s"),
        row("memory above the output", above, "MB"),
    ]
    print_table(rows)
    if arguments.json:
        write_report(arguments.json, rows)


if __name__ == "__main__":
    main()
