"""Encode and decode the held-out volumes of a training run, and say in figures and pictures what came back.

python evaluation/reconstruct.py --run outputs
python evaluation/reconstruct.py --run outputs --split test
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from omegaconf import OmegaConf

from dataset.geometry import crop_or_pad
from dataset.intensity import HUWindow
from dataset.prepared import PreparedVolume
from dataset.volume_io import Volume, write_nifti
from ddpm.device import DEVICE_HELP, chosen_device
from errors import ExitCode, run_command
from evaluation.metrics.codebook import CodeUsage
from evaluation.metrics.columns import IMAGE_COLUMNS
from evaluation.metrics.image import volume_metrics
from evaluation.panels import comparison_panel
from evaluation.records import write_record
from vq_gan_3d.codec import VQCodec
from vq_gan_3d.pretrained import load_codec
from vq_gan_3d.tiled_batches import computing_in

# What the table shows: key, heading, format. The last two are the predecessor's measures under their honest names.
COLUMNS = (
    *IMAGE_COLUMNS,
    ("pearson_r", "Pearson r*", "{:.4f}"),
    ("psnr_minmax_db", "min-max PSNR dB*", "{:.2f}"),
)


@torch.inference_mode()
def reconstruct(codec: VQCodec, window: HUWindow, hu: np.ndarray) -> tuple[np.ndarray, torch.Tensor]:
    """Encode and decode a whole volume of any size.

    Args:
        codec: in evaluation mode.
        window: its HU window.
        hu: int16 (D, H, W).

    Returns:
        Reconstruction float32 HU (D, H, W) and code numbers (d, h, w).
    """
    stride = codec.config.total_stride
    padded_size = tuple(-(-size // step) * step for size, step in zip(hu.shape, stride, strict=True))
    padded, _ = crop_or_pad(hu, np.eye(4), padded_size, (0, 0, 0))  # air at the far ends, cropped again below
    device = next(codec.parameters()).device
    volume = window.to_unit(torch.from_numpy(np.ascontiguousarray(padded)).to(device))[None, None]  # (1, 1, D, H, W)
    with computing_in(None, device):
        result = codec(volume)
    d, h, w = hu.shape
    return window.to_hu(result.volume[0, 0, :d, :h, :w]).cpu().numpy(), result.indices[0].cpu()


def evaluate(volumes: list[PreparedVolume], codec: VQCodec, window: HUWindow, output: Path) -> dict[str, object]:
    """Reconstruct volumes into ``output`` (NIfTI and PNG each); returns metrics by volume, their means and code use."""
    output.mkdir(parents=True, exist_ok=True)
    usage = CodeUsage(codec.config.n_codes)
    table: dict[str, dict[str, float]] = {}
    for volume in volumes:
        hu = np.asarray(volume.open())
        reconstruction, indices = reconstruct(codec, window, hu)
        usage.update(indices)
        output_unit, target_unit = (window.to_unit(torch.from_numpy(np.array(x))) for x in (reconstruction, hu))
        table[volume.name] = volume_metrics(output_unit, target_unit, window)
        result = Volume(reconstruction, volume.affine, source=volume.name)
        write_nifti(output / f"{volume.name}.nii.gz", result)
        shown = window.to_hu(window.to_unit(hu))
        comparison_panel(shown, reconstruction, result.spacing_mm, output / f"{volume.name}.png")
    means = {key: mean(row[key] for row in table.values()) for key, _, _ in COLUMNS}
    return {
        "volumes": table,
        "mean": means,
        "code_usage": usage.usage(),
        "code_perplexity": usage.perplexity(),
        "data_range_hu": window.width_hu,
    }


def print_table(report: dict[str, object]) -> None:
    """The metrics, one row a volume."""
    rows = report["volumes"] | {"mean": report["mean"]}  # type: ignore[operator]
    width = max(len(name) for name in rows)
    print("  ".join(["volume".ljust(width), *(heading for _, heading, _ in COLUMNS)]))
    for name, row in rows.items():
        cells = (form.format(row[key]).rjust(len(heading)) for key, heading, form in COLUMNS)
        print("  ".join([name.ljust(width), *cells]))
    print(f"range {report['data_range_hu']:.0f} HU; code usage {report['code_usage']:.1%}, ", end="")
    print(f"perplexity {report['code_perplexity']:.0f}")
    print(
        "* for comparison with figures in circulation: a correlation was printed as SSIM, and PSNR per-volume min-max"
    )


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="output_dir of a training run")
    parser.add_argument("--checkpoint", type=Path, help="checkpoint (default: final.ckpt of the run)")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for results (default: sample_reconstructions, or test_reconstructions, in the run)",
    )
    parser.add_argument(
        "--split", choices=("validation", "test"), default="validation",
        help="held-out volumes, or those of the cohort's test patients, if it has any (default: validation)",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> int:
    """Evaluate a run; exit 1 if it was a demo and missed its threshold."""
    from dataset.from_config import (  # imports Lightning, which --help need not wait for
        data_module,
        run_config,
        sources_of_test_split,
    )

    config = run_config(arguments.run)
    device = chosen_device(arguments.device)
    codec, window = load_codec(arguments.checkpoint or arguments.run / "checkpoints" / "final.ckpt", device)
    data = data_module(config)
    if arguments.split == "test":
        data.sources["validation"] = sources_of_test_split(config)
    data.build(0, 1)
    folder = "test_reconstructions" if arguments.split == "test" else "sample_reconstructions"
    output = arguments.output or arguments.run / folder
    report = evaluate(data.datasets["validation"].volumes, codec, window, output)
    write_record(output / "metrics.json", report | {"split": arguments.split})
    print_table(report)
    print(f"pictures, volumes and metrics: {output}")
    if (threshold := OmegaConf.select(config, "demo.min_psnr_db")) is not None:
        reached = report["mean"]["psnr_db"]  # type: ignore[index]
        passed = reached > threshold
        print(f"held-out PSNR {reached:.2f} dB, threshold {threshold:.2f} dB: {'passed' if passed else 'MISSED'}")
        return ExitCode.OK if passed else ExitCode.BUG
    return ExitCode.OK


if __name__ == "__main__":
    args = parse_arguments()
    sys.exit(run_command(lambda: main(args), debug=args.debug))
