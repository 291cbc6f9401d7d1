"""Can an embolism still be told in the generated volumes? A classifier of real volumes judges them, beside controls.

python evaluation/clinical.py --run outputs_ddpm --classifier outputs_pe/checkpoints/final.ckpt
python evaluation/clinical.py --run outputs_ddpm --classifier volumes.ckpt --xray-classifier radiographs.ckpt

The classifier (ddpm/classifier, trained on real volumes of other patients) is shown each held-out scan, the scan after
the codec, the volume generated from its radiograph, and with the same noise from another patient's. A generated volume
is made of the radiograph and noise and can know no more than that: what the radiograph alone tells, a classifier of
radiographs says (the same training with model.input=xray). Of phantoms the emboli are known, and each is looked for.
The model is told the radiograph only, no label and no report. The Fréchet distance is by the classifier's features
unless --features names others. A run that was interrupted goes on where it stopped when the command is given again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm.device import DEVICE_HELP, chosen_device
from errors import ConfigurationError, ExitCode, InputError, run_command

if TYPE_CHECKING:
    import numpy as np

    from ddpm.classifier.judge import Judge
    from evaluation.held_out import HeldOut, Sampling
    from evaluation.metrics.frechet import PlaneFeatures

_LEAST = 2  # of patients with and without embolism: with fewer there is no variance


def open_judges(
    held_out: HeldOut, classifier: Path, xray_classifier: Path | None, device: str
) -> tuple[Judge, Judge | None]:
    """The classifiers, refused where they do not fit the run or know its held-out patients.

    Raises:
        InputError: a checkpoint is none, of another input, grid or codec, or was trained on held-out patients.
        ConfigurationError: another HU window.
    """
    from ddpm.classifier.judge import Judge

    judge = Judge(classifier, device, held_out.generator.codec)
    judge.require_volumes()
    judge.require_window(held_out.generator.codec.window, "the codec of the run")
    for case in held_out.cases.cases:
        judge.require_grid(case.latent.shape_dhw, case.latent.affine)
    judges = [judge]
    if xray_classifier is not None:
        judges.append(Judge(xray_classifier, device))
        judges[1].require_radiographs()
    chosen = {case.name for case in held_out.cases.cases}
    patients = {source.patient for source in held_out.data.sources["validation"] if source.name in chosen}
    for one in judges:
        one.require_unseen(sorted(patients))
    return judge, judges[1] if len(judges) > 1 else None


def labelled_cases(held_out: HeldOut) -> list[int]:
    """Numbers of the held-out patients of whom somebody knows whether they have an embolism.

    Raises:
        InputError: too few with or without, or the run draws crops.
    """
    from ddpm.conditions import UNKNOWN_LABEL

    if held_out.cases.settings.crop_dhw is not None:
        raise InputError(
            f"{held_out.checkpoint}: draws crops, a label is of a whole volume: give a run on whole fields"
        )
    labels = [case.label for case in held_out.cases.cases]
    counts = [labels.count(value) for value in (0, 1)]
    if min(counts) < _LEAST:
        raise InputError(
            f"{held_out.checkpoint}: of {len(labels)} held-out patients {counts[1]} with embolism, {counts[0]} "
            f"without, {labels.count(UNKNOWN_LABEL)} that nobody labelled: {_LEAST} of each are needed, "
            "give more --cases"
        )
    return [number for number, label in enumerate(labels) if label != UNKNOWN_LABEL]


def evaluate(
    held_out: HeldOut,
    numbers: list[int],
    output: Path,
    sampling: Sampling,
    judges: tuple[Judge, Judge | None],
    features: PlaneFeatures,
) -> tuple[dict[str, dict[str, Any]], list[dict[str, np.ndarray]], dict[str, str]]:
    """Evaluate patients into ``output``, leaving out those that are there already.

    Returns:
        Records by patient, their features, and a reason for each patient that failed.
    """
    from evaluation.clinical_case import case_record, draw_case, features_of
    from evaluation.metrics.generation import derangement
    from evaluation.records import read_arrays, read_record, write_arrays, write_record

    order = derangement(len(held_out.cases), sampling.seed)
    records: dict[str, dict[str, Any]] = {}
    rows: list[dict[str, np.ndarray]] = []
    failed: dict[str, str] = {}
    for done, number in enumerate(numbers, start=1):
        name = held_out.cases.cases[number].name
        path, arrays = (output / "cases" / f"{name}.{kind}" for kind in ("json", "npz"))
        record, found = read_record(path), read_arrays(arrays)
        if record is None or found is None:
            try:
                drawn = draw_case(held_out, number, order[number], sampling)
                record, found = case_record(held_out, number, drawn, *judges), features_of(drawn, features)
            except InputError as error:
                failed[name] = str(error)
                continue
            write_arrays(arrays, found)
            write_record(path, record)
            scores = ", ".join(f"{role} {score:+.2f}" for role, score in record["scores"].items())
            truth = "embolism" if record["label"] else "none"
            print(f"{done}/{len(numbers)} {name} ({truth}): log-odds {scores}", flush=True)
        records[name] = record
        rows.append(found)
    return records, rows, failed


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="output_dir of the diffusion training")
    parser.add_argument("--classifier", type=Path, required=True, help="checkpoint of the classifier of volumes")
    parser.add_argument("--xray-classifier", type=Path, help="checkpoint of the classifier of radiographs")
    parser.add_argument("--checkpoint", type=Path, help="of the diffusion model (default: final.ckpt of the run)")
    parser.add_argument("--codec", type=Path, help="checkpoint of the VQ-GAN (default: the run's copy)")
    parser.add_argument("--output", type=Path, help="folder for results (default: clinical in the run)")
    parser.add_argument("--cases", type=int, help="at most so many held-out patients (default: all)")
    parser.add_argument("--steps", type=int, default=20, help="of the sampler (default: 20)")
    parser.add_argument("--sampler", default="dpm_solver_pp_2m", help="(default: dpm_solver_pp_2m)")
    parser.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance, 1 is off (default: 1)")
    parser.add_argument("--rescale", type=float, default=0.0, help="of guided samples, 0 to 1 (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise and of the shuffling (default: 0)")
    parser.add_argument(
        "--features",
        help="network of slices (N, 1, 224, 224) -> (N, F): a TorchScript file, or package.module:function",
    )
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> int:
    """Evaluate a run; exit 4 if patients had to be left out."""
    if arguments.cases is not None and arguments.cases < 2 * _LEAST:
        raise ConfigurationError(f"--cases {arguments.cases}: give {2 * _LEAST} or more")
    if arguments.steps < 1 or arguments.seed < 0:
        raise ConfigurationError(
            f"--steps {arguments.steps} --seed {arguments.seed}: give 1 step or more, a seed from 0"
        )
    from ddpm.classifier.judge import OWN_FEATURES, plane_features
    from ddpm.samplers import sampler_by_name
    from evaluation.clinical_summary import frechet, summarise
    from evaluation.clinical_table import print_report
    from evaluation.held_out import Sampling, open_run
    from evaluation.metrics.frechet import features_of_slices, load_features
    from evaluation.records import claim, write_record

    sampler_by_name(arguments.sampler)
    device = chosen_device(arguments.device)
    held_out = open_run(arguments.run, arguments.checkpoint, arguments.codec, arguments.cases, device)
    numbers = labelled_cases(held_out)
    judges = open_judges(held_out, arguments.classifier, arguments.xray_classifier, device)
    features: PlaneFeatures
    if arguments.features is None:
        name, features = OWN_FEATURES, plane_features(judges[0])
    else:
        name, network = load_features(arguments.features, device)
        features = features_of_slices(network, held_out.generator.codec.window)
    sampling = Sampling(arguments.steps, arguments.sampler, arguments.guidance, arguments.rescale, seed=arguments.seed)
    output = arguments.output or arguments.run / "clinical"
    settings = {
        "model": held_out.digest,
        "codec": held_out.generator.codec.content_hash,
        "classifier": judges[0].digest,
        "xray_classifier": judges[1].digest if judges[1] else "none",
        "features": name,
        "cases": [case.name for case in held_out.cases.cases],
        **vars(sampling),
    }
    claim(output, settings)
    records, rows, failed = evaluate(held_out, numbers, output, sampling, judges, features)
    if len(records) < 2 * _LEAST:
        raise InputError(f"{len(failed)} of {len(numbers)} patients failed; the first: {next(iter(failed.values()))}")
    report = summarise(records) | {"frechet": {"features": name, "by_role": frechet(rows)}}
    write_record(
        output / "report.json", {"settings": settings, "summary": report, "patients": records, "failed": failed}
    )
    print_report(report)
    print(f"report: {output / 'report.json'}")
    for patient, reason in failed.items():
        print(f"left out {patient}: {reason}", file=sys.stderr)
    return ExitCode.SKIPS if failed else ExitCode.OK


if __name__ == "__main__":
    args = parse_arguments()
    sys.exit(run_command(lambda: main(args), debug=args.debug))
