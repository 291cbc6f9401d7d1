"""One HTML file of what a run has reached: X-rays, planes, errors, curves, tables, and volumes to scroll through.

python evaluation/report.py --run outputs/demo

The folder is a run of a training, the results of an evaluation, or a folder that holds several of them. What was never
made is left out, with a line that says how to make it. The file opens without a network.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ddpm.device import DEVICE_HELP, chosen_device
from errors import ConfigurationError, ExitCode, run_command

if TYPE_CHECKING:
    from evaluation.report_collect import Found


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, nargs="+", required=True, help="folder of a run, of results, or of several")
    parser.add_argument("--output", type=Path, help="the file (default: report.html in the folder)")
    parser.add_argument("--cases", type=int, default=3, help="held-out patients with pictures (default: 3)")
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> int:
    """Write the report; exit 4 if something that is there could not be read."""
    if arguments.cases < 0:
        raise ConfigurationError(f"--cases {arguments.cases}: give 0 or more")
    from dataset.atomic import atomic_write, make_folder
    from evaluation.report_collect import collect

    output = arguments.output or arguments.run[0] / "report.html"
    found = collect(arguments.run)
    _announce(found)
    from evaluation.report_sections import write_report  # imports torch, which a wrong folder need not wait for

    html = write_report(found, arguments.cases, chosen_device(arguments.device))
    make_folder(output.parent)
    with atomic_write(output) as handle:
        handle.write(html.encode())
    for line in found.damaged:
        print(f"left out {line}", file=sys.stderr)
    print(f"report: {output} ({len(html.encode()) / 1e6:.1f} MB)")
    return ExitCode.SKIPS if found.damaged else ExitCode.OK


def _announce(found: Found) -> None:
    for run in found.runs:
        print(f"found: {run.kind} training {run.name}", flush=True)
    for part, results in found.results.items():
        for result in results:
            print(f"found: {part.replace('_', ' ')} {result.name}", flush=True)


if __name__ == "__main__":
    args = parse_arguments()
    sys.exit(run_command(lambda: main(args), debug=args.debug))
