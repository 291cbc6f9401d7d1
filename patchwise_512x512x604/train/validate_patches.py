"""Validate a codec on the patches that it was trained on: the tiles that cover each volume, one by one.

Says where in a volume a codec is weak (patches.csv, the worst patch as a picture). For whole volumes without borders
between patches see compute_metrics.py.

python train/validate_patches.py --checkpoint outputs/checkpoints/final.ckpt --data_dir /folder
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from pathlib import Path
from typing import Any

from errors import run_command
from patchwise_512x512x604.options import add_arguments

# key, heading, format
COLUMNS = (
    ("patches", "patches", "{:d}"),
    ("psnr_db", "PSNR dB", "{:.2f}"),
    ("worst_psnr_db", "worst patch dB", "{:.2f}"),
    ("psnr_pe_window_db", "PE-window dB", "{:.2f}"),
    ("mae_hu", "MAE HU", "{:.1f}"),
    ("bias_hu", "bias HU", "{:+.1f}"),
)


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, tiled=False)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder of .nii.gz or .b2nd, or one file")
    parser.add_argument(
        "--patch_size", type=int, nargs=3, metavar=("D", "H", "W"), help="voxels (default: that of the training)"
    )
    parser.add_argument("--max_patches", type=int, help="of each volume, evenly spaced (default: all)")
    parser.add_argument("--output", type=Path, default=Path("validation_results"), help="folder for the results")
    parser.add_argument("--cache_dir", type=Path, help="folder for prepared volumes (default: the user's cache folder)")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> int:
    """Validate; 4 if some volumes could not be read."""
    from dataset.atomic import atomic_write, make_folder
    from dataset.sources import default_cache, prepare_all
    from errors import ConfigurationError, ExitCode, InputError
    from evaluation.metrics.codebook import CodeUsage
    from patchwise_512x512x604 import evaluation_set as shared
    from patchwise_512x512x604.patch_validation import patch_size_of, validate_volume

    say = shared.start_logging()
    if arguments.max_patches is not None and arguments.max_patches < 1:
        raise ConfigurationError(f"--max_patches {arguments.max_patches}: give a positive number of patches")
    cases = shared.find_cases(arguments.data_dir)
    model = shared.load_model(arguments)
    patch = shared.checked_tile(arguments.patch_size, model.codec) or patch_size_of(arguments.checkpoint)
    folder = arguments.output
    make_folder(folder)
    volumes, failed = prepare_all(cases, None, arguments.cache_dir or default_cache(), "volumes")
    for reason in failed.values():
        shared.log.warning("skipped %s", reason)
    if not volumes:
        raise InputError(f"none of {len(cases)} volumes can be read; the first: {next(iter(failed.values()))}")
    usage = CodeUsage(model.codec.config.n_codes)
    rows: list[dict[str, Any]] = []
    patches: list[dict[str, Any]] = []
    for volume in volumes:
        row, own = validate_volume(model, volume, patch, arguments.max_patches, usage, folder)
        rows.append(row)
        patches += own
        say(f"{volume.name}: {row['patches']} patches, {row['psnr_db']:.2f} dB")
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(patches[0]))
    writer.writeheader()
    writer.writerows(patches)
    with atomic_write(folder / "patches.csv") as handle:
        handle.write(table.getvalue().encode())
    summary = {
        "checkpoint": arguments.checkpoint.name,
        "patch_dhw": list(patch),
        "volumes": rows,
        "code_usage": usage.usage(),
        "code_perplexity": usage.perplexity(),
        "skipped": failed,
    }
    shared.write_json(folder / "validation.json", summary)
    shared.print_table(rows, COLUMNS)
    say(f"codes: {usage.usage():.1%} of {len(usage.counts)} used, perplexity {usage.perplexity():.0f}")
    say(f"patches.csv, validation.json and the worst patch of each volume: {folder}")
    return ExitCode.SKIPS if failed else ExitCode.OK


if __name__ == "__main__":
    args = parse_arguments()
    sys.exit(run_command(lambda: main(args), debug=args.debug))
