"""How many steps does sampling take? PSNR, Fréchet distance and seconds for every sampler and number of steps.

python evaluation/sampler_table.py --run outputs_ddpm

What is judged is whether 10 to 20 steps are as good as 250; where those were not measured there is no verdict. The row
"codec" is of the true codes, decoded: no sampler can do better. PSNR alone prefers few steps, whose volumes are blurred
towards the mean; the Fréchet distance between generated and true held-out volumes does not. Its features are, in this
order: a network of slices from a file or from an installed package (--features, 2.5-D), the project's own classifier
(--classifier, 2.5-D), else the run's own codec (3-D). Distances by different features, or of different numbers of
cases, cannot be compared. Rows that are already in the output are not measured again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm.device import DEVICE_HELP, chosen_device
from errors import ConfigurationError, ExitCode, InputError, run_command
from evaluation.sampler_verdict import CODEC, judge, print_table

if TYPE_CHECKING:
    import numpy as np

    from evaluation.held_out import HeldOut, Sampling

    VolumeOf = Callable[[int, dict[str, Any]], np.ndarray]

STEPS = (5, 10, 20, 50, 250)


@dataclass(frozen=True)
class Features:
    """What the Fréchet distance looks at.

    Attributes:
        name: for the report.
        planes: names of the sets of features whose distances are averaged.
        of: volume (D, H, W) HU -> for each of ``planes`` rows of features (N, F).
    """

    name: str
    planes: tuple[str, ...]
    of: Callable[[np.ndarray], Mapping[str, np.ndarray]]


def measure(held_out: HeldOut, volume_of: VolumeOf, features: Features, resamples: int) -> dict[str, Any]:
    """One volume for each held-out patient, against the patient's CT.

    Args:
        held_out: model and patients.
        volume_of: makes the volume float32 HU (D, H, W) of a patient, from the number and the sample of the data set.
        features: of the Fréchet distance.
        resamples: of its interval.

    Returns:
        ``psnr_body_db``, ``psnr_db``, ``drr_ncc`` (means), ``frechet`` and, of 2.5-D, its planes, ``frechet_low``,
        ``frechet_high`` (95 % interval over patients) and ``frechet_draws``; ``passes`` of the network for each volume;
        ``seconds`` per volume, decoding included, the first volume (warm-up) left out where there are others.

    Raises:
        InputError: a patient cannot be read, or the model gives numbers that are not finite.
    """
    import numpy as np

    from evaluation.metrics.anatomy import body_mask
    from evaluation.metrics.frechet import frechet_of_planes
    from evaluation.metrics.frechet_interval import centred_interval, frechet_draws
    from evaluation.metrics.generation import volume_scores

    window = held_out.generator.codec.window
    scores, seconds, passes = [], [], 0
    real, drawn = [], []

    def count(module: object, given: tuple[Any, ...], result: object) -> None:
        nonlocal passes
        passes += len(given[0])  # guidance may ask for both conditions in one batch

    handle = held_out.generator.network.unet.register_forward_hook(count)
    try:
        for number in range(len(held_out.cases)):
            sample = held_out.cases[number]
            for name, reason in sample["skipped"]:
                raise InputError(f"{name}: {reason}")
            truth, affine = window.to_hu(window.to_unit(sample["hu"][0].numpy())), sample["affine"].numpy()
            start = time.perf_counter()
            volume = volume_of(number, sample)
            seconds.append(time.perf_counter() - start)
            scores.append(volume_scores(volume, truth, body_mask(truth, affine), affine, window))
            real.append(features.of(truth))
            drawn.append(features.of(volume))
    finally:
        handle.remove()
    distance = frechet_of_planes(real, drawn, features.planes)
    draws = frechet_draws(real, drawn, features.planes, resamples=resamples)
    low, high = centred_interval(distance["frechet"], draws)
    return {
        **{key: float(np.mean([score[key] for score in scores])) for key in ("psnr_body_db", "psnr_db", "drr_ncc")},
        **(distance if len(features.planes) > 1 else {"frechet": distance["frechet"]}),
        "frechet_low": low,
        "frechet_high": high,
        "frechet_draws": draws.tolist(),
        "passes": passes // len(scores),
        "seconds": float(np.mean(seconds[1:] or seconds)),
    }


def measure_sampler(held_out: HeldOut, sampling: Sampling, features: Features, resamples: int) -> dict[str, Any]:
    """The row of a sampler and number of steps; see `measure`."""

    def volume_of(number: int, sample: dict[str, Any]) -> np.ndarray:
        shape = tuple(sample["hu"].shape[1:])
        return sampling.draw(held_out.generator, held_out.conditions(sample), shape, number)[0, 0]

    row = measure(held_out, volume_of, features, resamples)
    return {"sampler": sampling.sampler, "steps": sampling.steps, **row}


def measure_codec(held_out: HeldOut, features: Features, resamples: int) -> dict[str, Any]:
    """The row of the true codes, decoded: what the codec alone costs, and no sampler can get below."""
    generator = held_out.generator

    def volume_of(number: int, sample: dict[str, Any]) -> np.ndarray:
        d, h, w = sample["hu"].shape[1:]
        return generator.codec.decode(sample["code"][None].to(generator.device))[0, 0, :d, :h, :w].cpu().numpy()

    return {"sampler": CODEC, "steps": 0, **measure(held_out, volume_of, features, resamples)}


def features_by(held_out: HeldOut, given: str | None, classifier: Path | None, device: str) -> Features:
    """What the Fréchet distance looks at.

    Raises:
        InputError: a file is missing, no such network, or a classifier of another grid.
        ConfigurationError: a classifier of another HU window, or a package that is not installed.
    """
    import numpy as np
    import torch

    from evaluation.metrics.frechet import PLANES, features_of_slices, load_features, pooled_code

    codec = held_out.generator.codec
    window = codec.window
    if given is not None:
        name, network = load_features(given, device)
        return Features(f"2.5-D, {name}", PLANES, features_of_slices(network, window))
    if classifier is not None:
        from ddpm.classifier.judge import OWN_FEATURES, Judge, plane_features

        judge = Judge(classifier, device, codec)
        judge.require_volumes()
        judge.require_window(window, "the codec")
        if held_out.cases.settings.crop_dhw is not None:
            raise InputError(f"{classifier}: judges whole volumes, the run draws crops: leave --classifier")
        case = held_out.cases.cases[0]
        judge.require_grid(case.latent.shape_dhw, case.latent.affine)
        return Features(f"2.5-D, {OWN_FEATURES}", PLANES, plane_features(judge))
    encode = pooled_code(lambda unit: codec.codec.encode(unit.to(held_out.generator.device)))

    def of(hu: np.ndarray) -> dict[str, np.ndarray]:
        unit = window.to_unit(torch.from_numpy(np.ascontiguousarray(hu)))
        with torch.inference_mode():
            return {"volume": encode(unit[None, None]).cpu().numpy()}  # (1, F)

    return Features("3-D, the run's own codec", ("volume",), of)


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="output_dir of the diffusion training")
    parser.add_argument("--checkpoint", type=Path, help="of the diffusion model (default: final.ckpt of the run)")
    parser.add_argument("--codec", type=Path, help="checkpoint of the VQ-GAN (default: the run's copy)")
    parser.add_argument("--output", type=Path, help="JSON file (default: sampler_table.json in the run)")
    parser.add_argument("--cases", type=int, default=64, help="held-out patients, 2 or more (default: 64)")
    parser.add_argument(
        "--split", choices=("validation", "test"), default="validation",
        help="held-out patients, or those of the test set, if the cohort has one (default: validation)",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS), help="(default: 5 10 20 50 250)")
    parser.add_argument("--samplers", nargs="+", help="(default: all)")
    parser.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance, 1 is off (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument(
        "--features",
        help="network of slices (N, 1, 224, 224) -> (N, F): a TorchScript file, or package.module:function",
    )
    parser.add_argument("--classifier", type=Path, help="checkpoint of the project's own classifier of volumes")
    parser.add_argument(
        "--resamples", type=int, default=200, help="of patients, for the Fréchet distance's interval (default: 200)"
    )
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> int:
    """Measure all rows, each written as soon as it is there."""
    a = arguments
    if min(a.steps) < 1 or a.cases < 2 or a.resamples < 1:
        raise ConfigurationError(
            f"--steps {min(a.steps)} --cases {a.cases} --resamples {a.resamples}: give 1 step, 2 cases and 1 resample "
            "or more"
        )
    from dataset.atomic import make_folder
    from ddpm.samplers import SAMPLERS, sampler_by_name
    from evaluation.held_out import Sampling, open_run
    from evaluation.records import write_record

    samplers, device = a.samplers or list(SAMPLERS), chosen_device(a.device)
    for sampler in samplers:
        sampler_by_name(sampler)
    held_out = open_run(a.run, a.checkpoint, a.codec, a.cases, device, a.split)
    features = features_by(held_out, a.features, a.classifier, device)
    report: dict[str, Any] = {
        "model": held_out.digest,
        "cases": len(held_out.cases),
        "split": held_out.split,
        "told": ["radiograph", *held_out.tell],
        "features": features.name,
        "guidance": a.guidance,
        "seed": a.seed,
        "resamples": a.resamples,
        "device": device,
        "rows": [],
    }
    output = a.output or a.run / "sampler_table.json"
    make_folder(output.parent, "give another --output")
    known = _known_rows(output, report)
    for sampler, steps in [(CODEC, 0), *((sampler, steps) for sampler in samplers for steps in sorted(set(a.steps)))]:
        row = known.get((sampler, steps))
        if row is None:
            if sampler == CODEC:
                row = measure_codec(held_out, features, a.resamples)
            else:
                sampling = Sampling(steps, sampler, a.guidance, seed=a.seed)
                row = measure_sampler(held_out, sampling, features, a.resamples)
            print(f"{sampler} {steps}: {row['psnr_body_db']:.2f} dB, {row['seconds']:.3f} s", flush=True)
        report["rows"].append(row)
        write_record(output, report)
    report["verdicts"] = judge(report["rows"])
    write_record(output, report)
    print_table(report)
    print(f"report: {output}")
    return ExitCode.OK


def _known_rows(output: Path, report: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    """Rows of an earlier, interrupted run with the same settings; none where they differ or the file is damaged."""
    from evaluation.records import read_record

    old = read_record(output) or {}
    try:
        if all(old.get(key) == value for key, value in report.items() if key != "rows"):
            return {(row["sampler"], row["steps"]): row for row in old["rows"]}
    except (KeyError, TypeError):
        pass
    return {}


if __name__ == "__main__":
    args = parse_arguments()
    sys.exit(run_command(lambda: main(args), debug=args.debug))
