"""Look at a whole data set: kVp, kernels, spacing, depth, HU, and whether the vessels hold contrast at all.

python preprocess/analyze_dataset.py --input data/nifti --output data/analysis --workers 8

Reads every NIfTI file (with the JSON sidecar beside it) and every .b2nd store below --input, and writes
dataset_analysis.json (figures, and a record of each volume), dataset_analysis.html (the same with plots, one file that
needs no network) and analyze_dataset.json (the report that --resume goes on from). A volume that cannot be read is
listed and stops nothing; the exit code is then 4.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from errors import run_command
from preprocess.batch import Job, add_batch_arguments, run_as_asked, summarise

REPORT_NAME = "analyze_dataset.json"
JSON_NAME, PAGE_NAME = "dataset_analysis.json", "dataset_analysis.html"


def jobs_below(root: Path) -> list[Job]:
    """One job per volume below a folder, named by its path in it.

    Raises:
        ConfigurationError: no such folder.
        InputError: it holds no volume.
    """
    from dataset.pairs_case import sidecar_path
    from dataset.verification import find_volumes

    jobs = []
    for path in find_volumes(root, hint="convert DICOM with preprocess/dicom_to_nifti.py first"):
        sidecar = sidecar_path(path)
        arguments = {"volume": str(path), "sidecar": str(sidecar) if sidecar.is_file() else None}
        jobs.append(Job(path.relative_to(root).as_posix() if root.is_dir() else path.name, arguments))
    return jobs


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_batch_arguments(parser)
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> int:
    """Analyse a folder; exit 4 if some volumes could not be read, 3 if none could."""
    from dataset.atomic import atomic_write
    from preprocess.analysis_page import render_page
    from preprocess.analysis_summary import summarise_records
    from preprocess.analysis_volume import analyse_volume

    result = run_as_asked(analyse_volume, jobs_below(arguments.input), arguments, REPORT_NAME, "analysing volumes")
    summary = summarise_records(result.records, result.failures)
    for name, text in (
        (JSON_NAME, json.dumps(summary, indent=1, ensure_ascii=False)),
        (PAGE_NAME, render_page(summary, result.records)),
    ):
        with atomic_write(arguments.output / name) as handle:
            handle.write(text.encode())
    for what, counts in (("contrast", summary["counts"]["contrast_phase"]), ("flagged", summary["flags"])):
        if counts:
            print(f"{what}: " + "; ".join(f"{count} × {value}" for value, count in counts.items()))
    if common := summary["most_common_combinations"]:
        told = ", ".join(f"{key} {value}" for key, value in common[0].items() if key != "volumes")
        print(f"most common combination ({common[0]['volumes']} of {summary['volumes']}): {told}")
    print(f"page: {arguments.output / PAGE_NAME}")
    return summarise(result, "volumes analysed")


if __name__ == "__main__":
    args = parse_arguments()
    sys.exit(run_command(lambda: main(args), debug=args.debug))
