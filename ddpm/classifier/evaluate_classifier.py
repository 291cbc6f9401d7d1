"""How well a trained classifier finds embolisms in the held-out volumes of its run: AUROC with its interval.

python ddpm/classifier/evaluate_classifier.py --run outputs
python ddpm/classifier/evaluate_classifier.py --run outputs --compare other/checkpoints/final.ckpt
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from errors import ExitCode, InputError, run_command


def score(checkpoint: Path, hu_volumes: Any, device: str, codec_path: Path | None) -> list[float]:
    """Log-odds of an embolism for each volume.

    Args:
        checkpoint: of a classifier.
        hu_volumes: int16 arrays (D, H, W), read one at a time.
        device: where to compute.
        codec_path: checkpoint of the codec, for a classifier on latents.
    """
    import numpy as np
    import torch

    from dataset.intensity import HUWindow
    from ddpm.classifier.classifier import classifier_input, load_classifier
    from vq_gan_3d.latents import FrozenCodec

    classifier, codec_hash = load_classifier(checkpoint, device)
    codec = None
    if codec_hash is not None:
        if codec_path is None:
            raise InputError(f"{checkpoint}: judges latents: name their codec with --codec")
        codec = FrozenCodec.load(codec_path, device)
        if codec.content_hash != codec_hash:
            raise InputError(f"{codec_path}: not the codec that {checkpoint} was trained on: give that one")
    window = HUWindow(classifier.config.hu_min, classifier.config.hu_max)
    scores = []
    with torch.inference_mode():
        for hu in hu_volumes:
            volume = torch.from_numpy(np.ascontiguousarray(hu))[None, None].to(device)  # (1, 1, D, H, W)
            scores.append(float(classifier(classifier_input(volume, window, codec))))
    return scores


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="output_dir of a training run")
    parser.add_argument("--checkpoint", type=Path, help="checkpoint (default: final.ckpt of the run)")
    parser.add_argument(
        "--compare", type=Path, help="another checkpoint, compared on the same volumes by DeLong's test"
    )
    parser.add_argument("--codec", type=Path, help="checkpoint of the 3D VQ-GAN, for a classifier on latents")
    parser.add_argument("--output", type=Path, help="JSON (default: validation_results/classifier.json in the run)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> int:
    """Score the held-out volumes of a run."""
    import numpy as np

    from dataset.atomic import atomic_write
    from dataset.from_config import run_config
    from ddpm.classifier.stage import labelled_data
    from ddpm.prepare import label_of
    from evaluation.metrics.statistics import auroc_interval, delong

    config: Any = run_config(arguments.run)
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
    scores = {
        key: score(path, (np.asarray(volume.open()) for volume in volumes), arguments.device, codec)
        for key, path in paths.items()
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
    print(f"{len(names)} held-out volumes, {int(labels.sum())} with embolism")
    print(f"AUROC {areas['scores']} (95 % by bootstrap over volumes): {paths['scores']}")
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
    print(f"scores of all volumes: {output}")
    return ExitCode.OK


if __name__ == "__main__":
    args = parse_arguments()
    sys.exit(run_command(lambda: main(args), debug=args.debug))
