"""The whole pipeline in one command, on phantoms or on your own folder of DICOM or NIfTI.

python demo.py                          # phantoms
python demo.py --data /folder/of/ct     # your own: a .nii.gz or a DICOM series a patient, some patients at least

Every stage is a command of this project, printed before it runs, so that it can be copied and run by hand. Interrupt it
whenever you like: the same command goes on where it stopped, and passes over what is done. It ends with the place of
the report and, on phantoms, with exit code 1 unless held-out figures exceed the thresholds of
config/experiment/demo.yaml.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from errors import ConfigurationError, ExitCode, InputError, run_command

if TYPE_CHECKING:
    from evaluation.pipeline import Stage

ROOT = Path(__file__).resolve().parent
# An epoch of a small cohort passes over its volumes several times, so that it has about so many samples.
_EPOCH = 64


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        output: folder of all results.
        data: folder of DICOM or NIfTI; None for phantoms.
        patients: phantoms.
        held_out: of them.
        size: grid that volumes are brought to, W×H×D.
        sampling_steps: of the diffusion sampler.
        codec: further overrides of the first stage's training.
        ddpm: of the diffusion training.
        workers: processes of the preparation.
    """

    output: Path
    data: Path | None
    patients: int
    held_out: int
    size: str
    sampling_steps: int
    codec: tuple[str, ...] = ()
    ddpm: tuple[str, ...] = ()
    workers: int = 1

    def at(self, *names: str) -> Path:
        """A place in the output folder."""
        return self.output.joinpath(*names)


def stages(plan: Plan) -> Iterator[Stage]:
    """The pipeline in order; each stage is asked for when those before it are done.

    Raises:
        InputError: the folder of own data is missing or empty.
    """
    yield from preparation(plan)
    yield from training(plan)
    yield from judgement(plan)


def preparation(plan: Plan) -> Iterator[Stage]:
    """From DICOM or NIfTI to volumes on one grid, radiographs, and the table that joins them."""
    from evaluation.pipeline import Stage

    at, batch = plan.at, ("--workers", str(plan.workers), "--resume")
    source, nifti, patients = plan.data, plan.data, None
    key = at("nifti.key")  # where the conversion of own data makes it
    if source is None:
        hospital, source = at("hospital"), at("hospital", "ct")
        patients, key = at("hospital", "patients.csv"), at("hospital", "phantom.key")
        arguments = ("--output", _path(hospital), "--patients", str(plan.patients), "--held-out", str(plan.held_out))
        yield Stage("cohort", "phantom patients: DICOM series and radiographs", "preprocess/make_phantom_cohort.py",
                    (*arguments, *batch), (), (hospital, patients), (hospital,))  # fmt: skip
    elif (source / "patients.csv").is_file():
        patients = source / "patients.csv"
    names: tuple[str, ...] = ()
    if plan.data is None or not _holds_nifti(plan.data):
        nifti, names = at("nifti"), ("--key", _path(key))
        yield Stage("nifti", "DICOM to NIfTI: one validated CT a study, no identity", "preprocess/dicom_to_nifti.py",
                    ("--input", _path(source), "--output", _path(nifti), *names, *batch), (source,), (nifti,),
                    (nifti,))  # fmt: skip
    assert nifti is not None
    yield Stage("volumes", f"volumes of {plan.size} voxels", "preprocess/build_store.py",
                ("--input", _path(nifti), "--output", _path(at("volumes")), "--grid", plan.size, *batch), (nifti,),
                (at("volumes"),), (at("volumes"),))  # fmt: skip
    cache = ("--cache", _path(at("cache", "verified.json")))
    yield Stage("verify", "every voxel read and compared with its checksum", "preprocess/verify.py",
                ("--input", _path(at("volumes")), "--output", _path(at("verified")), *cache), (at("volumes"),),
                (at("verified"),), (at("verified"),))  # fmt: skip
    yield Stage("drr", "radiographs rendered from CT", "preprocess/render_drr.py",
                ("--input", _path(at("volumes")), "--output", _path(at("drr")), "--views", "frontal", "--size", "128",
                 *batch), (at("volumes"),), (at("drr"),), (at("drr"),))  # fmt: skip
    known = () if patients is None else ("--patients", _path(patients), *names)
    yield Stage("pairs", "CTs joined with radiographs, labels and splits", "preprocess/make_pairs.py",
                ("--input", _path(at("volumes")), "--xrays", _path(at("drr")), "--output", _path(at("pairs.csv")),
                 "--held-out-xrays", _path(at("held_out_xrays")), *known),
                (at("volumes"), at("drr"), *(() if patients is None else (patients, *_radiographs_of(patients)))),
                (at("pairs.csv"), at("held_out_xrays")), (at("pairs.csv"), at("held_out_xrays")))  # fmt: skip


def training(plan: Plan) -> Iterator[Stage]:
    """Codec, latents, diffusion."""
    from evaluation.pipeline import Stage

    at, own = plan.at, plan.data is not None
    codec, ddpm = at("codec", "checkpoints", "final.ckpt"), at("ddpm", "checkpoints", "final.ckpt")
    table = at("pairs.csv")
    size = f"dataset.size=[{','.join(reversed(plan.size.split('x')))}]"
    cohort = ("dataset=xray_ctpa", f"dataset.csv={_path(table)}", f"dataset.cache_dir={_path(at('cache'))}", size,
              f"dataset.patches_per_volume={_repeats(table)}")  # fmt: skip
    # the thresholds were measured on phantoms and say nothing of other cohorts
    judged = ("demo=null",) if own else ()
    yield Stage("codec", "3D VQ-GAN", "baseline_256x256x64/train/train_vqgan.py",
                ("experiment=demo", *cohort, f"output_dir={_path(at('codec'))}", *judged, *plan.codec),
                (table, at("volumes")), (codec,), (at("codec"),), training=at("codec"))  # fmt: skip
    restored = at("codec", "sample_reconstructions", "metrics.json")
    yield Stage("reconstruct", "what the codec gives back of held-out patients", "evaluation/reconstruct.py",
                ("--run", _path(at("codec"))), (codec,), (restored,), (restored.parent,), may_miss=True)  # fmt: skip
    yield Stage("latents", "latents of all volumes", "preprocess/encode_latents.py",
                ("--input", _path(at("volumes")), "--output", _path(at("latents")), "--checkpoint", _path(codec)),
                (codec, at("volumes")), (at("latents"),), (at("latents"),))  # fmt: skip
    yield Stage("ddpm", "latent diffusion from radiographs", "ddpm/train/train_ddpm.py",
                ("experiment=demo_ddpm", *cohort, f"dataset.latents_dir={_path(at('latents'))}",
                 f"pretrained_vqgan={_path(codec)}", f"output_dir={_path(at('ddpm'))}", *plan.ddpm),
                (table, at("latents"), codec), (ddpm,), (at("ddpm"),), training=at("ddpm"))  # fmt: skip


def judgement(plan: Plan) -> Iterator[Stage]:
    """Figures with controls, one file for inference, volumes from X-ray files alone, and the report."""
    from evaluation.pipeline import Stage

    at, steps = plan.at, ("--steps", str(plan.sampling_steps))
    codec, ddpm = at("codec", "checkpoints", "final.ckpt"), at("ddpm", "checkpoints", "final.ckpt")
    figures, bundle = at("evaluation", "report.json"), at("final_model.ckpt")
    words = f"{'phantoms' if plan.data is None else 'an own folder'}, volumes of {plan.size} voxels"
    yield Stage("evaluation", "held-out patients against right, shuffled, absent and mirrored radiographs",
                "evaluation/xray_to_ct.py",
                ("--run", _path(at("ddpm")), "--output", _path(at("evaluation")), *steps),
                (ddpm,), (figures,), (at("evaluation"),))  # fmt: skip
    yield Stage("bundle", "one file for inference, with its model card", "ddpm/export_bundle.py",
                ("--checkpoint", _path(ddpm), "--codec", _path(codec), "--output", _path(bundle),
                 "--report", _path(figures), "--data", words),
                (ddpm, codec, figures), (bundle,), (bundle,))  # fmt: skip
    yield Stage("inference", "from X-ray files of held-out patients to volumes", "vqgan_inference.py",
                ("--checkpoint", _path(bundle), "--xray", _path(at("held_out_xrays")),
                 "--output", _path(at("generated")), *steps, "--png"),
                (bundle, at("held_out_xrays"), *_targets(at("held_out_xrays"))), (at("generated"),),
                (at("generated"),))  # fmt: skip
    yield Stage("report", "report", "evaluation/report.py",
                ("--run", _path(plan.output), "--output", _path(at("report.html"))),
                (figures, codec, ddpm, at("codec", "sample_reconstructions")), (at("report.html"),),
                (at("report.html"),))  # fmt: skip


def _path(path: Path) -> str:
    return str(path.absolute())


def _radiographs_of(patients: Path) -> list[Path]:
    """The radiographs that a table of patients names, which may lie anywhere; none of a table that cannot be read."""
    from dataset.pairs_table import table_rows

    try:
        cells = [row.get("xray", "") for _, row in table_rows(patients, None, ())]
    except InputError:
        return []  # the stage itself says what is wrong
    return sorted({(patients.parent / Path(cell).expanduser()).resolve() for cell in cells if cell})


def _targets(folder: Path) -> list[Path]:
    """The files that the links of a folder lead to: a link itself does not change with its file."""
    return sorted({path.resolve() for path in folder.iterdir()}) if folder.is_dir() else []


def _holds_nifti(folder: Path) -> bool:
    """Whether a folder of own data is taken as volumes rather than as DICOM."""
    from dataset.verification import NIFTI_SUFFIXES

    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder: --data wants one of DICOM or of .nii.gz files")
    return any(name.lower().endswith(NIFTI_SUFFIXES) and not name.startswith(".")
               for _, _, names in os.walk(folder) for name in names)  # fmt: skip


def _repeats(table: Path) -> int:
    """How often an epoch passes over the training volumes of a cohort."""
    from dataset.pairs_table import read_pairs
    from dataset.splits import TRAIN

    return math.ceil(_EPOCH / max(1, sum(case.split == TRAIN for case in read_pairs(table))))


def verdict(plan: Plan, min_psnr_db: float | None, min_gain_db: float | None) -> bool:
    """Print the held-out figures beside their thresholds; whether all are exceeded (None judges nothing)."""
    import json

    codec = json.loads(plan.at("codec", "sample_reconstructions", "metrics.json").read_text())
    gain = json.loads(plan.at("evaluation", "report.json").read_text())["summary"]["gains"]["shuffled"]["psnr_body_db"]
    # no number, which is null in JSON, exceeds no threshold
    restored, low, mean = (
        math.nan if value is None else value for value in (codec["mean"]["psnr_db"], gain["low"], gain["estimate"])
    )
    rows = (
        ("held-out codec PSNR, dB", restored, "", min_psnr_db),
        ("gain of the right over the shuffled X-ray, PSNR in the body, dB: lower end of its 95 % interval", low,
         f" (mean {mean:.2f}, {gain['n']} patients)", min_gain_db),
    )  # fmt: skip
    passed = True
    for what, value, more, threshold in rows:
        if threshold is None:
            told = "not judged: the thresholds were measured on the phantoms"
        else:
            exceeded = value > threshold
            passed &= exceeded
            told = f"threshold {threshold:.2f}, {'passed' if exceeded else 'MISSED'}"
        print(f"{what}: {value:.2f}{more}; {told}")
    return passed


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="(default: outputs/demo)")
    parser.add_argument(
        "--data",
        type=Path,
        help="own folder of DICOM or NIfTI; with a patients.csv in it (preprocess/make_pairs.py) for own radiographs",
    )
    parser.add_argument("--patients", type=int, help="phantoms (default: of config/experiment/demo.yaml, as all below)")
    parser.add_argument("--held-out", type=int, help="of the phantoms")
    parser.add_argument("--size", help="grid of volumes, W×H×D such as 64x64x32")
    parser.add_argument("--steps", type=int, help="of the diffusion sampler")
    parser.add_argument("--min-psnr-db", type=float, help="threshold of the codec")
    parser.add_argument("--min-gain-db", type=float, help="threshold of the gain over shuffled radiographs")
    parser.add_argument("--codec", nargs="+", default=[], metavar="KEY=VALUE", help="for the first stage's training")
    parser.add_argument("--ddpm", nargs="+", default=[], metavar="KEY=VALUE", help="for the diffusion training")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> int:
    """Run all stages and judge the result."""
    from omegaconf import OmegaConf

    from evaluation.pipeline import Pipeline, shown

    a, begin = arguments, time.monotonic()
    config = OmegaConf.load(ROOT / "config" / "experiment" / "demo.yaml")
    settings, own = config.demo, a.data is not None
    size = a.size or "x".join(str(length) for length in reversed(config.dataset.size))
    if len(size.split("x")) != 3 or not all(part.isdecimal() for part in size.split("x")):
        raise ConfigurationError(f"--size {size}: a size W×H×D such as 64x64x32")
    plan = Plan(
        a.output.expanduser(),
        None if a.data is None else a.data.expanduser(),
        settings.patients if a.patients is None else a.patients,
        settings.held_out if a.held_out is None else a.held_out,
        size,
        settings.sampling_steps if a.steps is None else a.steps,
        tuple(a.codec),
        tuple(a.ddpm),
        a.workers,
    )
    if plan.data is not None and plan.output.resolve().is_relative_to(plan.data.resolve()):
        raise ConfigurationError(f"{plan.output}: lies in the folder of data, which must not change: another --output")
    pipeline = Pipeline(plan.output)
    with pipeline.claimed():
        pipeline.belongs_to("phantoms" if plan.data is None else str(plan.data.resolve()))
        for stage in stages(plan):
            pipeline.run(stage)
    least = [
        default if given is None and not own else given
        for given, default in ((a.min_psnr_db, settings.min_psnr_db), (a.min_gain_db, settings.min_gain_db))
    ]
    print(f"\nall stages done in {time.monotonic() - begin:.0f} s")
    passed = verdict(plan, *least)
    pictures = plan.at("evaluation"), plan.at("generated"), plan.at("codec", "sample_reconstructions")
    print(f"pictures: {', '.join(map(shown, pictures))}")
    print(f"model:    {shown(plan.at('final_model.ckpt'))}")
    print(f"report:   {shown(plan.at('report.html'))}")
    return ExitCode.OK if passed else ExitCode.BUG


if __name__ == "__main__":
    args = parse_arguments()
    sys.exit(run_command(lambda: main(args), debug=args.debug))
