"""How well a trained classifier finds embolisms in the held-out cases of its run: AUROC with its interval.

Each classifier is shown what it was trained on: the volume, its latent, or the frontal radiograph alone. One that knows
some of these patients, or volumes of another grid or HU window, is refused.

python ddpm/classifier/evaluate_classifier.py --run outputs
python ddpm/classifier/evaluate_classifier.py --run outputs --compare other/checkpoints/final.ckpt
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm.device import DEVICE_HELP, chosen_device
from errors import ExitCode, run_command

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from dataset.intensity import HUWindow
    from dataset.prepared import PreparedVolume
    from ddpm.classifier.judge import Judge


def require_fit(judge: Judge, volumes: Sequence[PreparedVolume], patients: Collection[str], window: HUWindow) -> None:
    """Refuse a classifier whose figures on these cases would mean nothing.

    Args:
        judge: of volumes, latents or radiographs.
        volumes: that it is shown; a radiograph has neither their grid nor their window.
        patients: whose they are.
        window: of the run.

    Raises:
        InputError: it was trained on some of the patients, or on another grid.
        ConfigurationError: it was trained on another HU window.
    """
    judge.require_unseen(sorted(patients))
    if judge.sees == "xray":
        return
    judge.require_window(window, "the run")
    for volume in volumes:
        judge.require_grid(volume.open().shape, volume.affine)


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="output_dir of a training run")
    parser.add_argument("--checkpoint", type=Path, help="checkpoint (default: final.ckpt of the run)")
    parser.add_argument("--compare", type=Path, help="another checkpoint, compared on the same cases by DeLong's test")
    parser.add_argument("--codec", type=Path, help="checkpoint of the 3D VQ-GAN, for a classifier on latents")
    parser.add_argument("--output", type=Path, help="JSON (default: validation_results/classifier.json in the run)")
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> int:
    """Score the held-out cases of a run."""
    import numpy as np

    from dataset.atomic import atomic_write
    from dataset.from_config import run_config
    from dataset.intensity import HUWindow
    from ddpm.classifier.judge import Judge
    from ddpm.classifier.stage import labelled_data
    from ddpm.prepare import label_of
    from evaluation.metrics.statistics import auroc_interval, delong

    config: Any = run_config(arguments.run)
    device = chosen_device(arguments.device)
    codec = arguments.codec or (Path(config.pretrained_vqgan) if config.get("pretrained_vqgan") else None)
    data = labelled_data(config)
    data.build(0, 1)
    sources = {source.name: source for source in data.sources["validation"]}
    volumes = data.datasets["validation"].volumes
    names = [volume.name for volume in volumes]
    labels = np.array([label_of(sources[name]) == 1 for name in names])
    paths = {"scores": arguments.checkpoint or arguments.run / "checkpoints" / "final.ckpt"}
    if arguments.compare is not None:
        paths["compared"] = arguments.compare
    judges = {key: Judge(path, device, codec) for key, path in paths.items()}
    window = HUWindow(config.dataset.hu_min, config.dataset.hu_max)
    for judge in judges.values():
        require_fit(judge, volumes, {sources[name].patient for name in names}, window)
    scores = {
        key: [judge.score_case(sources[volume.name], volume, data.cache) for volume in volumes]
        for key, judge in judges.items()
    }
    areas = {key: auroc_interval(values, labels) for key, values in scores.items()}
    report: dict[str, Any] = {
        "volumes": len(names),
        "with_embolism": int(labels.sum()),
        "auroc": areas["scores"]._asdict(),
        "cases": {
            name: {"label": bool(labels[i])} | {k: v[i] for k, v in scores.items()} for i, name in enumerate(names)
        },
    }
    print(f"{len(names)} held-out cases, {int(labels.sum())} with embolism")
    print(f"AUROC {areas['scores']} (95 % by bootstrap over cases): {paths['scores']}")
    if "compared" in areas:
        test = delong(scores["scores"], scores["compared"], labels)
        report["compared"] = areas["compared"]._asdict()
        report["delong"] = {"difference": test.difference._asdict(), "p_value": test.p_value}
        print(f"AUROC {areas['compared']}: {paths['compared']}")
        print(f"difference {test.difference}, p = {test.p_value:.3g} (DeLong)")
    output = arguments.output or arguments.run / "validation_results" / "classifier.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as handle:
        handle.write(json.dumps(report, indent=2).encode())
    print(f"scores of all cases: {output}")
    return ExitCode.OK


if __name__ == "__main__":
    args = parse_arguments()
    sys.exit(run_command(lambda: main(args), debug=args.debug))
