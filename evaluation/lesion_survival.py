"""How many emboli survive encoding and decoding? Phantoms with known clots, a trained codec, shares by size.

python evaluation/lesion_survival.py --checkpoint outputs/checkpoints/final.ckpt
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ddpm.device import DEVICE_HELP, chosen_device
from errors import ConfigurationError, ExitCode, InputError, run_command

_NAME = "lesion_survival.json"  # by which evaluation/report.py finds it


def evaluate(checkpoint: Path, size_dhw: tuple[int, int, int], cases: int, seed: int, device: str) -> dict[str, Any]:
    """Encode and decode phantoms that have emboli.

    Args:
        checkpoint: of the 3D VQ-GAN.
        size_dhw: voxels of a phantom; the whole thorax fits, so that more of them means finer ones.
        cases: phantoms.
        seed: of the first.
        device: where to compute.

    Returns:
        ``survival`` (`evaluation.metrics.lesions.survival`), ``lesions`` by phantom, and the settings.

    Raises:
        InputError: the checkpoint is none, or no phantom shows an embolus at this size.
    """
    from dataset.phantom import make_phantom
    from evaluation.metrics.lesions import find_lesions, survival
    from vq_gan_3d.latents import FrozenCodec

    codec = FrozenCodec.load(checkpoint, device)
    patients = {}
    for number in range(seed, seed + cases):
        phantom = make_phantom(number, size_dhw, pe_prevalence=1.0)
        code = codec.encode(phantom.hu)
        d, h, w = phantom.hu.shape
        after = codec.decode(code[None].to(device))[0, 0, :d, :h, :w].cpu().numpy()
        blood = phantom.mask("pulmonary_artery")
        before = codec.window.to_hu(codec.window.to_unit(phantom.hu))
        patients[f"phantom_{number:05d}"] = find_lesions(before, after, phantom.emboli_mask, blood, phantom.spacing_mm)
    if not any(patients.values()):
        raise InputError(f"no embolus is visible in {cases} phantoms of {list(size_dhw)} voxels: give a larger --size")
    return {
        "checkpoint": codec.content_hash,
        "size_dhw": list(size_dhw),
        "cases": cases,
        "survival": survival(patients),
        "lesions": {name: [vars(lesion) for lesion in lesions] for name, lesions in patients.items()},
    }


def print_table(report: dict[str, Any]) -> None:
    """Shares by size."""
    print("embolus (diameter)   emboli  patients  survived [95 % interval]  contrast kept")
    for name, row in report["survival"].items():
        share = row["survived"]
        cell = f"{share['estimate']:.0%} [{share['low']:.0%}, {share['high']:.0%}]"
        print(f"{name:20} {row['lesions']:6d} {row['patients']:9d}  {cell:24}  {row['kept']:.0%}")


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="of the 3D VQ-GAN")
    parser.add_argument("--output", type=Path, help=f"JSON file (default: {_NAME} in the run)")
    parser.add_argument("--size", type=int, nargs=3, default=[96, 192, 192], metavar=("D", "H", "W"), help="voxels")
    parser.add_argument("--cases", type=int, default=16, help="phantoms, all with emboli (default: 16)")
    parser.add_argument("--seed", type=int, default=20_000, help="of the first phantom (default: 20000)")
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> int:
    """Measure, print, write."""
    if arguments.cases < 1 or arguments.seed < 0:
        raise ConfigurationError(
            f"--cases {arguments.cases} --seed {arguments.seed}: give 1 case or more from seed 0 on"
        )
    d, h, w = arguments.size
    from dataset.atomic import make_folder
    from evaluation.records import write_record

    checkpoint, device = arguments.checkpoint, chosen_device(arguments.device)
    # a run keeps its checkpoints in a folder; a checkpoint elsewhere has no run, and the result lies beside it
    run = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    output = arguments.output or run / _NAME
    report = evaluate(checkpoint, (d, h, w), arguments.cases, arguments.seed, device)
    make_folder(output.parent, "give another --output")
    write_record(output, report)
    print_table(report)
    print(f"report: {output}")
    return ExitCode.OK


if __name__ == "__main__":
    args = parse_arguments()
    sys.exit(run_command(lambda: main(args), debug=args.debug))
