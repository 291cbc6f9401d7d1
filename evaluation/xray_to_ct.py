"""What are the volumes worth that a diffusion model makes of held-out radiographs? Figures, controls and pictures.

python evaluation/xray_to_ct.py --run outputs_ddpm --cases 64

For each held-out patient volumes are drawn from the own radiograph, another patient's, none and the mirrored one, with
the same noise, and compared with the CT; beside them stand the mean of the training volumes, what a linear regression
on the training patients makes of the radiograph, and what the codec makes of the CT itself. Of each volume it is asked,
too, whether its patient's CT is the nearest of all. The model is told the radiograph alone: a report or a label, which
some are trained with, would carry the answer past it (--tell names what it is told nevertheless). With --split training
the mean and the regression are left out: they were fitted on the very patients. A run that was interrupted goes on
where it stopped when the same command is given again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm.device import DEVICE_HELP, chosen_device
from errors import ConfigurationError, ExitCode, InputError, run_command

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from evaluation.held_out import Guide, HeldOut, Sampling

SCORES = (
    ("psnr_body_db", "PSNR body dB", "{:.2f}"),
    ("psnr_db", "PSNR dB", "{:.2f}"),
    ("psnr_slice_db", "PSNR slice dB", "{:.2f}"),
    ("ssim", "SSIM", "{:.4f}"),
    ("mae_body_hu", "MAE body HU", "{:.1f}"),
    ("mae_hu", "MAE HU", "{:.1f}"),
    ("bias_hu", "bias HU", "{:+.1f}"),
    ("drr_ncc", "NCC of DRR", "{:.4f}"),
    ("drr_ncc_body", "NCC in body", "{:.4f}"),
)
WHO = {
    "validation": "held-out patients",
    "training": "patients of the training, which the model has seen",
    "test": "patients of the test set",
}


def evaluate_case(
    held_out: HeldOut, number: int, other: int, sampling: Sampling, samples: int, guide: Guide | None = None
) -> dict[str, Any]:
    """Draw all volumes of one patient.

    Args:
        held_out: model and patients.
        number: of the patient.
        other: whose radiograph is the shuffled one.
        sampling: how.
        samples: volumes from the right radiograph.
        guide: pulls all volumes, if given.

    Returns:
        ``name``, ``hu`` (the truth), ``affine``, ``xrays``, ``volumes`` by role, ``samples``, and ``mirrored``: None
        where a mirrored radiograph would tell nothing (`evaluation.controls.shows_sides`).

    Raises:
        InputError: the patient, or the other one, cannot be read.
    """
    from ddpm.patient import joined
    from evaluation.controls import mirrored, shows_sides, with_xrays_of, without_conditions

    sample, stranger = held_out.cases[number], held_out.cases[other]
    for entry in (sample, stranger):
        for name, reason in entry["skipped"]:
            raise InputError(f"{name}: {reason}")
    batch, shape = held_out.conditions(sample), tuple(sample["hu"].shape[1:])
    window = held_out.generator.codec.window
    own = sampling.draw(held_out.generator, batch, shape, number, samples, guide)[0]
    controls = [with_xrays_of(batch, held_out.conditions(stranger)), without_conditions(batch)]
    if sided := shows_sides(batch, held_out.views):
        controls.append(mirrored(batch, held_out.views))
    drawn = sampling.draw(held_out.generator, joined(controls), shape, number, guide=guide)[:, 0]
    shuffled, unconditional = drawn[:2]
    d, h, w = shape
    codec = held_out.generator.codec.decode(sample["code"][None].to(held_out.generator.device))
    return {
        "name": sample["name"],
        "hu": window.to_hu(window.to_unit(sample["hu"][0].numpy())),
        "affine": sample["affine"].numpy(),
        "xrays": sample["xray"].numpy(),
        "volumes": {
            "right": own[0],
            "shuffled": shuffled,
            "unconditional": unconditional,
            "codec": codec[0, 0, :d, :h, :w].cpu().numpy(),
        },
        "samples": list(own),
        "mirrored": drawn[2] if sided else None,
    }


def evaluate(
    held_out: HeldOut, output: Path, sampling: Sampling, samples: int, pictures: int, guide: Guide | None = None
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Evaluate all held-out patients into ``output``, leaving out those that are there already.

    Returns:
        Figures by patient, and a reason for each that failed.
    """
    from evaluation.held_out import LinearMap
    from evaluation.metrics.generation import case_report, derangement, mean_volume
    from evaluation.metrics.retrieval import add_retrieval, thumbnail
    from evaluation.panels import save_panel
    from evaluation.records import read_arrays, read_record, write_arrays, write_record

    names = [case.name for case in held_out.cases.cases]
    order = derangement(len(names), sampling.seed)
    mean: np.ndarray | None = None
    linear: LinearMap | None = None
    results: dict[str, dict[str, Any]] = {}
    thumbnails: dict[str, dict[str, np.ndarray]] = {}
    failed: dict[str, str] = {}
    window = held_out.generator.codec.window
    # crops of different places have no mean; and of patients of the training it has seen the answer
    controls = held_out.cases.settings.crop_dhw is None and held_out.split != "training"
    for number, name in enumerate(names):
        record, arrays = (output / "cases" / f"{name}.{kind}" for kind in ("json", "npz"))
        picture = output / f"{name}.png"
        known, small = read_record(record), read_arrays(arrays)
        if known is not None and small is not None and (number >= pictures or picture.is_file()):
            results[name], thumbnails[name] = known, small
            continue
        try:
            drawn = evaluate_case(held_out, number, order[number], sampling, samples, guide)
        except InputError as error:
            failed[name] = str(error)
            continue
        truth, volumes = drawn["hu"], drawn["volumes"]
        if controls:
            if mean is None:
                mean, linear = mean_volume(held_out.training_volumes(truth.shape)), LinearMap.fit(held_out, truth.shape)
            volumes["mean"] = mean
            if linear is not None and (guess := linear.volume(held_out, number, truth.shape)) is not None:
                volumes["linear"] = guess
        report = case_report(
            truth, volumes, drawn["affine"], window, mirrored_hu=drawn["mirrored"], samples_hu=drawn["samples"]
        )
        cone = {
            key: value
            for key, role in (("ncc", "right"), ("ncc_shuffled", "shuffled"))
            if (value := held_out.cone_ncc(number, volumes[role], drawn["affine"])) is not None
        }
        report |= {"xray_of_shuffled": names[order[number]]} | ({"cone": cone} if cone else {})
        small = {"truth": truth, "right": volumes["right"], "shuffled": volumes["shuffled"]}
        small = {role: thumbnail(volume, window) for role, volume in small.items()}
        if number < pictures:
            save_panel(_panel(drawn), picture)
        write_arrays(arrays, small)
        write_record(record, report)
        results[name], thumbnails[name] = report, small
        scores = report["scores"]
        line = ", ".join(f"{role} {scores[role]['psnr_body_db']:.2f}" for role in scores)
        print(f"{number + 1}/{len(names)} {name}: PSNR in the body, dB: {line}", flush=True)
    if held_out.cases.settings.crop_dhw is None:  # where a crop lies, a model is told
        add_retrieval(results, thumbnails)
    return results, failed


def print_report(report: dict[str, Any], split: str, told: Sequence[str]) -> None:
    """Scores, gains, correlations and bars as tables."""
    from evaluation.metrics.generation import GAINS

    print(f"\n{report['cases']} {WHO[split]}; the model is told: {', '.join(told)}; mean [95 % interval]")
    print("  ".join(["volume".ljust(14), *(heading.rjust(22) for _, heading, _ in SCORES)]))
    for role, scores in report["scores"].items():
        print("  ".join([role.ljust(14), *(_cell(scores[key], form).rjust(22) for key, _, form in SCORES)]))
    compared = [score for score in SCORES if score[0] in GAINS]
    print("\ngain of the right radiograph over")
    print("  ".join([" " * 14, *(heading.rjust(22) for _, heading, _ in compared)]))
    for role, gains in report["gains"].items():
        print("  ".join([role.ljust(14), *(_cell(gains[key], form).rjust(22) for key, _, form in compared)]))
    print("\ncorrelation with the truth")
    for role, values in report["correlations"].items():
        cells = (f"{name} {_cell(value, '{:.3f}')}" for name, value in values.items())
        print("  ".join([role.ljust(14), *cells]))
    chirality = report["chirality"]
    share = f"{chirality['share_right_way_round']:.0%} above 0"
    upright = _cell(chirality, "{:.4f}")
    print(f"\nupright X-ray: projection's NCC with the truth's minus with the mirrored {upright}, {share}")
    print("(a chest that is drawn without looking passes that; whether the side follows the X-ray, the next line says)")
    for part in ("mirror", "cone", "retrieval", "diversity"):
        if part in report:
            print(f"{part}: " + ", ".join(f"{name} {_cell(v, '{:.4f}')}" for name, v in report[part].items()))
    if "mirror" not in report:
        print("mirror: left out, the model is told more of the side than a frontal radiograph, or has none")
    if "retrieval" in report:
        print(f"(retrieval: by chance the own CT is the nearest in {1 / report['retrieval']['rank']['n']:.1%})")
    print()
    for bar in report["bars"]:
        print(f"{'passed' if bar['passed'] else 'MISSED'}  {bar['bar']}: {_found(bar)}, {_asked(bar)}")


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", "--config", dest="run", type=Path, required=True, help="output_dir of the training")
    parser.add_argument("--checkpoint", type=Path, help="of the diffusion model (default: final.ckpt of the run)")
    parser.add_argument("--codec", type=Path, help="checkpoint of the VQ-GAN (default: the run's copy)")
    parser.add_argument("--output", type=Path, help="folder for results (default: xray_to_ct in the run)")
    parser.add_argument("--cases", type=int, help="at most so many patients (default: all)")
    parser.add_argument(
        "--split", choices=tuple(WHO), default="validation",
        help="held-out patients, those of the test set, if the cohort has one, or those of the training, to see what "
        "the model remembers (default: validation)",
    )  # fmt: skip
    parser.add_argument(
        "--tell", nargs="+", choices=("report", "label"), default=[],
        help="what the model is told of a patient beside the radiograph (default: nothing)",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=20, help="of the sampler (default: 20)")
    parser.add_argument("--sampler", default="dpm_solver_pp_2m", help="(default: dpm_solver_pp_2m)")
    parser.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance, 1 is off (default: 1)")
    parser.add_argument("--rescale", type=float, default=0.0, help="of guided samples, 0 to 1 (default: 0)")
    parser.add_argument("--classifier", type=Path, help="of latents (model.input=latent): guide all volumes by it")
    parser.add_argument(
        "--classifier-label", type=int, choices=(0, 1), default=1, help="1: embolism (default), 0: none"
    )
    parser.add_argument("--classifier-scale", type=float, default=1.0, help="1 is Bayes' rule (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise and of the shuffling (default: 0)")
    parser.add_argument(
        "--samples", type=int, default=1, help="per radiograph; 2 or more give diversity and their mean"
    )
    parser.add_argument("--pictures", type=int, default=4, help="patients with a picture (default: 4)")
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> int:
    """Evaluate a run; exit 4 if patients had to be left out."""
    if arguments.samples < 1 or arguments.steps < 1:
        raise ConfigurationError(f"--steps {arguments.steps} --samples {arguments.samples}: give 1 or more of each")
    if arguments.seed < 0:
        raise ConfigurationError(f"--seed {arguments.seed}: give 0, 1, 2, …")
    from evaluation.held_out import Guide, Sampling, open_run
    from evaluation.metrics.generation import summarise
    from evaluation.records import claim, write_record

    a = arguments
    held_out = open_run(a.run, a.checkpoint, a.codec, a.cases, chosen_device(a.device), a.split, a.tell)
    sampling = Sampling(arguments.steps, arguments.sampler, arguments.guidance, arguments.rescale, seed=arguments.seed)
    output = arguments.output or arguments.run / "xray_to_ct"
    settings = {
        "model": held_out.digest,
        "codec": held_out.generator.codec.content_hash,
        "cases": [case.name for case in held_out.cases.cases],
        "split": arguments.split,
        "told": ["radiograph", *held_out.tell],
        "samples": arguments.samples,
        **vars(sampling),
    }
    guide = None
    if a.classifier is not None:
        guide = Guide.load(a.classifier, held_out.generator, a.classifier_label, a.classifier_scale)
        settings |= {"classifier": guide.digest, "classifier_label": guide.label, "classifier_scale": guide.scale}
    claim(output, settings)
    results, failed = evaluate(held_out, output, sampling, a.samples, a.pictures, guide)
    if not results:
        raise InputError(f"none of {len(failed)} patients could be evaluated; the first: {next(iter(failed.values()))}")
    report = summarise(list(results.values()))
    write_record(
        output / "report.json", {"settings": settings, "summary": report, "patients": results, "failed": failed}
    )
    print_report(report, arguments.split, settings["told"])
    print(f"report and pictures: {output}")
    for name, reason in failed.items():
        print(f"left out {name}: {reason}", file=sys.stderr)
    return ExitCode.SKIPS if failed else ExitCode.OK


def _panel(drawn: dict[str, Any]) -> np.ndarray:
    from dataset.geometry import spacing_mm
    from ddpm.panel import sample_panel

    return sample_panel(drawn["xrays"], drawn["hu"], drawn["volumes"]["right"], spacing_mm(drawn["affine"]))


def _found(bar: dict[str, Any]) -> str:
    return f"{bar['low']}" if isinstance(bar["low"], int) else f"{bar['low']:.3f}"  # a number of patients, or a figure


def _asked(bar: dict[str, Any]) -> str:
    return f"asked {bar['asked']:g} or more" if bar["asked"] else "asked more than 0"


def _cell(value: dict[str, float], form: str) -> str:
    return f"{form.format(value['estimate'])} [{form.format(value['low'])}, {form.format(value['high'])}]"


if __name__ == "__main__":
    args = parse_arguments()
    sys.exit(run_command(lambda: main(args), debug=args.debug))
