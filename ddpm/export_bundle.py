"""One file for inference, and its model card, from trained checkpoints.

python ddpm/export_bundle.py --checkpoint outputs_ddpm/checkpoints/final.ckpt --output outputs/final_model.ckpt
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# A script's own folder comes first on the path, and there ddpm.py would hide the package `ddpm`.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from errors import InputError, ProjectError, one_line, run_command

_MAX_REPORT_BYTES = 1 << 28
# Of the summary of a report; its table of patients is left out, since names would travel with the model.
_SUMMARY = ("cases", "scores", "gains", "correlations", "chirality", "mirror", "cone", "retrieval", "diversity", "bars")
_SAMPLING = ("split", "told", "steps", "sampler", "guidance", "rescale", "seed", "samples")


def read_report(path: Path, model: str, codec: str) -> dict[str, Any]:
    """The summary in a report of ``evaluation/xray_to_ct.py``.

    Args:
        path: of ``report.json``.
        model: SHA-256 of the file of the checkpoint that is exported.
        codec: content hash of its codec.

    Raises:
        InputError: missing, damaged, no such report, one of another model, or of volumes that a classifier guided.
    """
    try:
        if path.stat().st_size > _MAX_REPORT_BYTES:
            raise ValueError("too large")
        content = json.loads(path.read_text(encoding="utf-8"))
        settings, summary = content["settings"], content["summary"]
        known = settings["model"], settings["codec"]
        kept = {name: summary[name] for name in _SUMMARY if name in summary}
        drawn = {name: settings[name] for name in _SAMPLING if name in settings}
        if not {"cases", "scores"} <= kept.keys():
            raise ValueError("no scores")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"{path}: no report of evaluation/xray_to_ct.py ({reason}): give its report.json") from error
    if known != (model, codec):
        raise InputError(f"{path}: of another model: give the report of the checkpoint that is exported")
    if "classifier" in settings:
        raise InputError(
            f"{path}: its volumes were guided by a classifier, and no bundle has one: give a report that was made "
            "without --classifier"
        )
    return kept | {"sampling": drawn}


def training_facts(checkpoint: dict[str, Any], run: Path, data: str | None) -> dict[str, Any]:
    """What a checkpoint and the configuration beside it say of the training; no folder and no patient is named."""
    facts: dict[str, Any] = {"steps": int(checkpoint["state_dict"]["steps"])} if "state_dict" in checkpoint else {}
    contract = checkpoint.get("resume_contract", {})
    for key, name in (("training.batch_size × processes", "batch size"), ("training.seed", "seed")):
        if key in contract:
            facts[name] = contract[key]
    if "lora" in checkpoint:
        facts["adapters"] = "LoRA, folded in"
    if (record := run / "config.yaml").is_file():
        from omegaconf import OmegaConf

        config = OmegaConf.load(record)
        facts["dataset"] = str(OmegaConf.select(config, "dataset.name"))
        if facts["dataset"] == "phantom":
            facts["phantoms"] = int(OmegaConf.select(config, "dataset.n_patients"))
        facts |= _patients(config)
    return facts | ({"data": data} if data else {})


def _patients(config: Any) -> dict[str, int]:
    """Patients of the training and held out, as the configuration splits its data; {} where those are not there.

    That is no error, a model may be exported far from its data, but who exports it is told.
    """
    from omegaconf.errors import OmegaConfBaseException

    from dataset.from_config import data_module  # imports Lightning, which --help need not wait for

    try:
        sources = data_module(config).sources
    except (ProjectError, OmegaConfBaseException, AttributeError, TypeError) as error:  # or an older configuration
        print(f"the model card will not count patients: {one_line(error)}", file=sys.stderr)
        return {}
    counts = {split: len({source.patient for source in sources[split]}) for split in ("training", "validation")}
    return {"patients of the training": counts["training"], "patients held out from it": counts["validation"]}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="of ddpm/train/train_ddpm.py")
    parser.add_argument("--codec", type=Path, help="checkpoint of the 3D VQ-GAN (default: the copy in the run)")
    parser.add_argument("--output", type=Path, default=Path("outputs/final_model.ckpt"), help="(default: %(default)s)")
    parser.add_argument("--report", type=Path, help="report.json of evaluation/xray_to_ct.py, for the model card")
    parser.add_argument("--data", help="what it was trained on, in words, for the model card")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(arguments)


def main(arguments: argparse.Namespace) -> int:
    """Write the bundle and its card."""
    from dataset.atomic import atomic_write, make_folder
    from ddpm.bundle import write_bundle
    from ddpm.generate import load_ddpm
    from ddpm.model_card import model_card
    from ddpm.pretrained import read_ddpm

    checkpoint, output = arguments.checkpoint.expanduser(), arguments.output.expanduser()
    content = read_ddpm(checkpoint)
    generator = load_ddpm(checkpoint, arguments.codec and arguments.codec.expanduser())
    report = None
    if arguments.report is not None:
        with open(checkpoint, "rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        report = read_report(arguments.report, digest, generator.codec.content_hash)
    facts = training_facts(content, checkpoint.resolve().parent.parent, arguments.data)
    make_folder(output.parent)
    bundle = write_bundle(output, generator.network, generator.codec, training=facts, report=report)
    card = output.with_suffix(".md")
    with atomic_write(card) as handle:
        handle.write(model_card(bundle).encode())
    print(f"bundle {bundle.checksum[:12]}: {output}, {output.stat().st_size / 1e6:.1f} MB; model card: {card}")
    return 0


if __name__ == "__main__":
    args = parse_arguments()
    sys.exit(run_command(lambda: main(args), debug=args.debug))
