"""How many steps does sampling take? PSNR, Fréchet distance and seconds for every sampler and number of steps.

python evaluation/sampler_table.py --run outputs_ddpm --cases 32

PSNR alone prefers few steps, whose volumes are blurred towards the mean; the Fréchet distance between generated and
true held-out volumes does not. Its features are, in this order: a network of slices from a file or from an installed
package (--features, 2.5-D), the project's own classifier (--classifier, 2.5-D), else the run's own codec (3-D).
Distances by different features, or of different numbers of cases, cannot be compared. Rows that are already in the
output are not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import ConfigurationError, ExitCode, InputError, StorageError, run_command

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from evaluation.held_out import HeldOut, Sampling

    Distance = Callable[[list[np.ndarray], list[np.ndarray]], dict[str, float]]

STEPS = (5, 10, 20, 50, 250)
# "As good as many steps": within this share of the row with the most steps of the same sampler.
_TOLERANCE = 0.05


def measure_row(held_out: HeldOut, sampling: Sampling, distance: Distance) -> dict[str, Any]:
    """Draw one volume for each held-out patient.

    Returns:
        ``psnr_body_db`` and ``psnr_db`` (means), ``drr_ncc``, ``frechet`` and, of 2.5-D, its planes; ``seconds`` per
        volume, decoding included, the first volume (warm-up) left out where there are others.

    Raises:
        InputError: a patient cannot be read, or the model gives numbers that are not finite.
    """
    import numpy as np

    from evaluation.held_out import conditions_of
    from evaluation.metrics.anatomy import body_mask
    from evaluation.metrics.generation import volume_scores

    window = held_out.generator.codec.window
    scores, seconds = [], []
    true, drawn = [], []
    for number in range(len(held_out.cases)):
        sample = held_out.cases[number]
        for name, reason in sample["skipped"]:
            raise InputError(f"{name}: {reason}")
        truth, affine = window.to_hu(window.to_unit(sample["hu"][0].numpy())), sample["affine"].numpy()
        start = time.perf_counter()
        volume = sampling.draw(held_out.generator, conditions_of(sample), truth.shape, number)[0, 0]
        seconds.append(time.perf_counter() - start)
        scores.append(volume_scores(volume, truth, body_mask(truth, affine), affine, window))
        true.append(truth)
        drawn.append(volume)
    means = {key: float(np.mean([score[key] for score in scores])) for key in ("psnr_body_db", "psnr_db", "drr_ncc")}
    return {
        "sampler": sampling.sampler,
        "steps": sampling.steps,
        **means,
        **distance(true, drawn),
        "seconds": float(np.mean(seconds[1:] or seconds)),
    }


def distance_by(held_out: HeldOut, features: str | None, classifier: Path | None, device: str) -> tuple[str, Distance]:
    """What the Fréchet distance looks at: its name for the report, and the function.

    Raises:
        InputError: a file is missing, no such network, or a classifier of another grid.
        ConfigurationError: a classifier of another HU window, or a package that is not installed.
    """
    from evaluation.metrics.frechet import features_of_slices, frechet_3d, frechet_25d, load_features, pooled_code

    codec = held_out.generator.codec
    window = codec.window
    if features is not None:
        name, network = load_features(features, device)
        planes = features_of_slices(network, window)
        return f"2.5-D, {name}", lambda real, drawn: frechet_25d(real, drawn, planes)
    if classifier is not None:
        from ddpm.classifier.judge import OWN_FEATURES, Judge, plane_features

        judge = Judge(classifier, device, codec)
        judge.require_volumes()
        judge.require_window(window, "the codec")
        if held_out.cases.settings.crop_dhw is not None:
            raise InputError(f"{classifier}: judges whole volumes, the run draws crops: leave --classifier")
        case = held_out.cases.cases[0]
        judge.require_grid(case.latent.shape_dhw, case.latent.affine)
        own = plane_features(judge)
        return f"2.5-D, {OWN_FEATURES}", lambda real, drawn: frechet_25d(real, drawn, own)
    encode = pooled_code(lambda unit: codec.codec.encode(unit.to(held_out.generator.device)))
    return "3-D, the run's own codec", lambda real, drawn: {"frechet": frechet_3d(real, drawn, encode, window)}


def judge(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each sampler the fewest steps within 5 % of its longest run, in PSNR and in the Fréchet distance.

    Returns:
        By sampler ``reference`` (its greatest number of steps) and ``enough`` (None where there is no shorter run as
        good). A better figure than the reference's counts as within.
    """
    verdicts: dict[str, dict[str, Any]] = {}
    for sampler in dict.fromkeys(row["sampler"] for row in rows):
        own = sorted((row for row in rows if row["sampler"] == sampler), key=lambda row: row["steps"])
        last = own[-1]
        good = [
            row["steps"]
            for row in own[:-1]
            if row["psnr_body_db"] >= (1 - _TOLERANCE) * last["psnr_body_db"]
            and row["frechet"] <= (1 + _TOLERANCE) * last["frechet"]
        ]
        verdicts[sampler] = {"reference": last["steps"], "enough": min(good, default=None)}
    return verdicts


def print_table(report: dict[str, Any]) -> None:
    """All rows, and the verdict on each sampler."""
    print(f"\n{report['cases']} held-out patients; Fréchet distance: {report['features']}")
    print(f"{'sampler':18} steps PSNR body dB  PSNR dB  DRR NCC    Fréchet  s/volume")
    for row in report["rows"]:
        figures = f"{row['psnr_body_db']:12.2f} {row['psnr_db']:8.2f} {row['drr_ncc']:8.4f} {row['frechet']:10.4g}"
        print(f"{row['sampler']:18} {row['steps']:5d} {figures} {row['seconds']:9.3f}")
    for sampler, verdict in report["verdicts"].items():
        enough = "no fewer steps are" if verdict["enough"] is None else f"{verdict['enough']} steps are"
        print(f"{sampler}: {enough} within {_TOLERANCE:.0%} of {verdict['reference']} in PSNR and Fréchet distance")


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="output_dir of the diffusion training")
    parser.add_argument("--checkpoint", type=Path, help="of the diffusion model (default: final.ckpt of the run)")
    parser.add_argument("--codec", type=Path, help="checkpoint of the VQ-GAN (default: the run's copy)")
    parser.add_argument("--output", type=Path, help="JSON file (default: sampler_table.json in the run)")
    parser.add_argument("--cases", type=int, default=32, help="held-out patients, 2 or more (default: 32)")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS), help="(default: 5 10 20 50 250)")
    parser.add_argument("--samplers", nargs="+", help="(default: all)")
    parser.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance, 1 is off (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument(
        "--features",
        help="network of slices (N, 1, 224, 224) -> (N, F): a TorchScript file, or package.module:function",
    )
    parser.add_argument("--classifier", type=Path, help="checkpoint of the project's own classifier of volumes")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> int:
    """Measure all rows, each written as soon as it is there."""
    if min(arguments.steps) < 1 or arguments.cases < 2:
        raise ConfigurationError(
            f"--steps {min(arguments.steps)} --cases {arguments.cases}: give 1 step and 2 cases or more"
        )
    from ddpm.samplers import SAMPLERS, sampler_by_name
    from evaluation.held_out import Sampling, open_run

    samplers = arguments.samplers or list(SAMPLERS)
    for sampler in samplers:
        sampler_by_name(sampler)
    held_out = open_run(arguments.run, arguments.checkpoint, arguments.codec, arguments.cases, arguments.device)
    name, distance = distance_by(held_out, arguments.features, arguments.classifier, arguments.device)
    report: dict[str, Any] = {
        "model": held_out.digest,
        "cases": len(held_out.cases),
        "features": name,
        "guidance": arguments.guidance,
        "seed": arguments.seed,
        "device": arguments.device,
        "rows": [],
    }
    output = arguments.output or arguments.run / "sampler_table.json"
    known = _known_rows(output, report)
    for sampler in samplers:
        for steps in sorted(set(arguments.steps)):
            row = known.get((sampler, steps))
            if row is None:
                sampling = Sampling(steps, sampler, arguments.guidance, seed=arguments.seed)
                row = measure_row(held_out, sampling, distance)
                print(f"{sampler} {steps}: {row['psnr_body_db']:.2f} dB, {row['seconds']:.3f} s", flush=True)
            report["rows"].append(row)
            _write(output, report)
    report["verdicts"] = judge(report["rows"])
    _write(output, report)
    print_table(report)
    print(f"report: {output}")
    return ExitCode.OK


def _known_rows(output: Path, report: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    """Rows of an earlier, interrupted run with the same settings; none where they differ or the file is damaged."""
    try:
        old = json.loads(output.read_text())
        if all(old.get(key) == value for key, value in report.items() if key != "rows"):
            return {
                (row["sampler"], row["steps"]): {k: math.nan if v is None else v for k, v in row.items()}
                for row in old["rows"]
            }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return {}


def _write(output: Path, report: dict[str, Any]) -> None:
    from dataset.atomic import atomic_write

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{output.parent}: cannot be created ({error.strerror}): give another --output") from error
    rows = [
        {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
        for row in report["rows"]
    ]
    with atomic_write(output) as handle:
        handle.write(json.dumps(report | {"rows": rows}, indent=1, allow_nan=False).encode())


if __name__ == "__main__":
    args = parse_arguments()
    sys.exit(run_command(lambda: main(args), debug=args.debug))
