"""Options that the patch-wise evaluation scripts have in common; light, so that ``--help`` answers at once."""

from __future__ import annotations

import argparse
from pathlib import Path

WEIGHTS = ("linear", "cosine", "gaussian")  # `patch_utils.Kind`, whose module imports torch


def add_arguments(parser: argparse.ArgumentParser, *, tiled: bool = True) -> None:
    """The options that all evaluation scripts have; ``tiled``: those of whole volumes too."""
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint of a training run")
    if tiled:
        parser.add_argument("--mode", choices=("halo", "blend"), default="halo", help="exact (default) or blended")
        parser.add_argument(
            "--overlap", type=float, metavar="SHARE", help="of blended tiles, 0 to below 1 (default: 0.25)"
        )
        parser.add_argument("--weights", choices=WEIGHTS, help="of blended tiles (default: linear)")
        parser.add_argument("--tile_size", type=int, nargs=3, metavar=("D", "H", "W"), help="voxels")
        parser.add_argument(
            "--batch_size",
            type=int,
            help="tiles at a time (default: by the free memory of the GPU; 1 on the CPU, and in halo mode without "
            "--tile_size, where one tile takes that memory)",
        )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default: fp32")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
