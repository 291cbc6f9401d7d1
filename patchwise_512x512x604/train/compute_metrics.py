"""Reconstruct whole volumes and measure them: metrics in HU for each case and, with intervals, for all of them.

python train/compute_metrics.py --checkpoint outputs/checkpoints/final.ckpt --test_data /folder --output report.json

Without --test_data the held-out volumes of the run that wrote the checkpoint are measured.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from errors import run_command
from evaluation.metrics.columns import IMAGE_COLUMNS
from patchwise_512x512x604.options import add_arguments

# key, heading, format
COLUMNS = (
    *IMAGE_COLUMNS,
    ("code_usage", "codes used", "{:.1%}"),
    ("seam_ratio", "seam ratio", "{:.3f}"),
    ("seconds", "seconds", "{:.1f}"),
)
AGGREGATED = tuple(key for key, _, _ in COLUMNS if key != "seconds")


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument(
        "--test_data", type=Path, help="folder of .nii.gz or .b2nd, or one file (default: the run's held-out volumes)"
    )
    parser.add_argument("--output", type=Path, default=Path("metrics_report.json"), help="the report (JSON)")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> int:
    """Measure all cases; 4 if some could not be read."""
    from dataset.atomic import make_folder
    from evaluation.metrics.codebook import CodeUsage
    from evaluation.metrics.statistics import bootstrap
    from patchwise_512x512x604 import evaluation_set as shared

    say = shared.start_logging()
    data = arguments.test_data
    cases = shared.held_out_cases(arguments.checkpoint) if data is None else shared.find_cases(data)
    model = shared.load_model(arguments)
    make_folder(arguments.output.parent)
    usage = CodeUsage(model.codec.config.n_codes)
    rows: list[dict[str, Any]] = []
    loop = shared.CaseLoop()
    for case, volume in loop.over(cases):
        result, metrics = model.measure(volume.hu)
        own = CodeUsage(len(result.code_counts))
        own.counts += result.code_counts
        usage.counts += result.code_counts
        shape = volume.hu.shape
        rows.append(
            {"name": case.name, "shape_dhw": list(shape), "spacing_mm": list(volume.spacing_mm)}
            | metrics
            | {"code_usage": own.usage(), "code_perplexity": own.perplexity()}
            | {"tiles": result.tiles, "seconds": result.seconds}
        )
        say(f"{case.name}: {rows[-1]['psnr_db']:.2f} dB in {result.seconds:.1f} s")
    aggregate = {}
    for key in (*AGGREGATED, "code_perplexity"):
        interval = bootstrap([row[key] for row in rows])
        aggregate[key] = {"mean": interval.estimate, "low": interval.low, "high": interval.high}
    report = {
        "checkpoint": arguments.checkpoint.name,
        "data_range_hu": [model.window.min_hu, model.window.max_hu],
        "mode": model.mode,
        "overlap": model.overlap if model.mode == "blend" else None,
        "weights": model.weights if model.mode == "blend" else None,
        "precision": arguments.precision,
        "cases": rows,
        "aggregate": aggregate,
        "interval": "95 %, percentile bootstrap over cases",
        "code_usage": usage.usage(),
        "code_perplexity": usage.perplexity(),
        "n_codes": len(usage.counts),
        "skipped": loop.skipped,
    }
    shared.write_json(arguments.output, report)
    shared.print_table([*rows, _means(rows)], COLUMNS)
    say(f"all {len(rows)} cases together: {usage.usage():.1%} of {len(usage.counts)} codes, "
        f"perplexity {usage.perplexity():.0f}")  # fmt: skip
    say(f"report: {arguments.output}")
    return loop.exit_code


def _means(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"name": "mean"} | {key: sum(row[key] for row in rows) / len(rows) for key, _, _ in COLUMNS}


if __name__ == "__main__":
    args = parse_arguments()
    sys.exit(run_command(lambda: main(args), debug=args.debug))
