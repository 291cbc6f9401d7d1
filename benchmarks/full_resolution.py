"""A whole 512×512 volume of any depth through a codec and back, from a store: seconds and peak memory by depth.

python benchmarks/full_resolution.py [--quick] [--json FILE] [--checkpoint FILE] [--device cuda] [--precision bf16]

Without a checkpoint the weights of `--model` are those that nobody trained: their time and memory are those of trained
ones. Each volume has a process of its own. On the CPU the memory is all that was ever resident in it, libraries
included; on a GPU what tensors held.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import config as shared_config
from benchmarks.harness import Row, print_table, standard_parser, write_report
from dataset.phantom import make_phantom
from dataset.store import open_store, write_store
from dataset.volume_io import Volume
from vq_gan_3d.codec import VQCodec

ROOT = Path(__file__).resolve().parents[1]
DEPTHS, PLANE = (151, 604, 1208), 512
QUICK_DEPTHS, QUICK_PLANE = (24, 48), 64
PAINTED_SLICES = 16  # repeated along depth: painting each takes a minute, and no time or memory depends on it


def make_store(path: Path, depth: int, plane: int) -> None:
    """A phantom of depth×plane×plane voxels as a native store."""
    phantom = make_phantom(0, (PAINTED_SLICES, plane, plane))
    write_store(path, Volume(np.resize(phantom.hu, (depth, plane, plane)), phantom.affine), {})


def codec_of(checkpoint: str | None, model: str) -> tuple[VQCodec, object]:
    """A trained codec with its window, or one of a configuration."""
    from hydra import compose, initialize_config_dir

    from dataset.intensity import HUWindow
    from vq_gan_3d.pretrained import load_codec
    from vq_gan_3d.runner import build_module

    if checkpoint is not None:
        return load_codec(checkpoint)
    torch.manual_seed(0)
    base = Path(next(iter(shared_config.__path__))).parent / "baseline_256x256x64" / "config"
    with initialize_config_dir(version_base="1.3", config_dir=str(base)):
        codec = build_module(compose("base_cfg", [f"model={model}"])).codec
    assert isinstance(codec, VQCodec)
    return codec.eval(), HUWindow()


def measure(store: str, checkpoint: str | None, model: str, device: str, precision: str) -> None:
    """Run in a process of its own; prints seconds and bytes as JSON."""
    from dataset.intensity import HUWindow
    from patchwise_512x512x604.utils.reconstruction import reconstruct_volume

    codec, window = codec_of(checkpoint, model)
    assert isinstance(window, HUWindow)
    hu, kind = open_store(store).hu, torch.bfloat16 if precision == "bf16" else None
    if device != "cpu":  # a GPU's first run chooses its kernels
        reconstruct_volume(codec, hu[:128], window, device=device, precision=kind, write=lambda first, slices: None)
    result = reconstruct_volume(codec, hu, window, device=device, precision=kind, write=lambda first, slices: None)
    print(json.dumps({"seconds": result.seconds, "bytes": result.peak_bytes, "tiles": result.tiles}))


def rows_of(depth: int, plane: int, checkpoint: Path | None, model: str, device: str, precision: str) -> list[Row]:
    """Seconds and memory of one depth."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "volume.b2nd"
        make_store(store, depth, plane)
        code = "import json, sys\nfrom benchmarks.full_resolution import measure\nmeasure(*json.loads(sys.argv[1]))"
        arguments = json.dumps([str(store), None if checkpoint is None else str(checkpoint), model, device, precision])
        run = subprocess.run([sys.executable, "-c", code, arguments], cwd=ROOT, capture_output=True, text=True)
        if run.returncode:
            raise SystemExit(run.stderr)
    result = json.loads(run.stdout.splitlines()[-1])
    what = f"{plane}×{plane}×{depth} there and back, {model if checkpoint is None else checkpoint.name}, {precision}"
    return [
        Row(f"{what}: time", result["seconds"], "s"),
        Row(f"{what}: peak memory", result["bytes"] / 1e6, "MB"),
        Row(f"{what}: tiles", result["tiles"], ""),
    ]


def main() -> None:
    """Measure, print, write."""
    parser = standard_parser(__doc__ or "")
    parser.add_argument("--checkpoint", type=Path, help="a codec (default: untrained)")
    parser.add_argument("--model", default="vq_gan_3d_small", help="of config/model/, without --checkpoint")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="(default: fp32)")
    parser.add_argument("--depths", type=int, nargs="*", help=f"(default: {' '.join(map(str, DEPTHS))})")
    arguments = parser.parse_args()
    plane = QUICK_PLANE if arguments.quick else PLANE
    checkpoint = arguments.checkpoint.resolve() if arguments.checkpoint else None
    rows: list[Row] = []
    for depth in arguments.depths or (QUICK_DEPTHS if arguments.quick else DEPTHS):
        rows += rows_of(depth, plane, checkpoint, arguments.model, arguments.device, arguments.precision)
    print_table(rows)
    if arguments.json:
        write_report(arguments.json, rows)


if __name__ == "__main__":
    main()
