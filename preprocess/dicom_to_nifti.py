"""Turn folders of DICOM CT into NIfTI in Hounsfield units: one validated series per study, no identity in the results.

python preprocess/dicom_to_nifti.py --input hospital --output volumes [--workers 2]

Folders may be nested and files named in any way. Every study gives one volume, PATIENT_SERIES.nii.gz, with a JSON of
technical facts beside it; both names are hashes under a secret key. A series with missing slices, a tilted gantry,
mixed patients or anything else that would distort a volume is refused, and dicom_report.json says why.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from dataset.atomic import atomic_write
from dataset.pairs_keys import pseudonym
from errors import ConfigurationError, ExitCode, InputError, run_command
from preprocess.batch import Job, absolute_path, add_batch_arguments, run_as_asked, summarise
from preprocess.dicom_identity import load_key
from preprocess.dicom_index import Index, index_tree
from preprocess.dicom_retire import retire
from preprocess.dicom_rules import CONTRAST_CHOICES, load_rules
from preprocess.dicom_study import convert_study

REPORT_NAME = "dicom_report.json"


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_batch_arguments(parser)
    parser.add_argument("--rules", type=absolute_path, metavar="YAML", help="rules for the choice of series")
    parser.add_argument("--min-slices", type=int, help="fewer slices are no volume (default: 32)")
    parser.add_argument("--max-thickness", type=float, metavar="MM", help="thicker slices are refused (default: 5)")
    parser.add_argument("--contrast", choices=CONTRAST_CHOICES, help="contrast agent (default: prefer)")
    parser.add_argument(
        "--prefer-kernel", action="append", metavar="REGEX", help="kernels to prefer, best first; may be repeated"
    )
    parser.add_argument("--all-series", action="store_true", help="write every acceptable series, not only the best")
    parser.add_argument("--resample-tilt", action="store_true", help="resample a gantry tilt away, do not refuse it")
    parser.add_argument(
        "--key", type=absolute_path, help="secret key of the hashed names, made if absent (default: OUTPUT.key)"
    )
    parser.add_argument(
        "--source-table",
        type=absolute_path,
        metavar="CSV",
        help="write which study came from which folder: identifies!",
    )
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> int:
    """Index the input, convert every study, say what became of them."""
    output: Path = arguments.output
    rules = load_rules(
        arguments.rules,
        min_slices=arguments.min_slices,
        max_thickness_mm=arguments.max_thickness,
        contrast=arguments.contrast,
        prefer_kernels=arguments.prefer_kernel,
    )
    table: Path | None = arguments.source_table
    if table is not None and table.resolve().is_relative_to(output.resolve()):
        raise ConfigurationError(f"{table}: names patients' folders: keep it apart from the results in --output")
    index = index_tree(arguments.input, skip=output)
    key_file: Path = arguments.key or output.with_name(output.name + ".key")
    key = load_key(key_file, output)
    jobs = [
        Job(
            pseudonym(key, "study", uid),
            {
                "files": files,
                "output": str(output),
                "name": pseudonym(key, "study", uid),
                "key": str(key_file),
                "rules": asdict(rules),
                "resample_tilt": arguments.resample_tilt,
                "all_series": arguments.all_series,
            },
        )
        for uid, files in index.studies.items()
    ]
    if table is not None:
        write_source_table(table, jobs)
    result = run_as_asked(convert_study, jobs, arguments, REPORT_NAME, "DICOM to NIfTI")
    series = {job.name: uids for job, uids in zip(jobs, index.series.values(), strict=True)}
    retired = retire(output, result, series, key)
    written = sum(len(record["chosen"]) for record in result.records.values())
    left_out = sum(len(record["rejected"]) for record in result.records.values())
    print_ignored(index)
    print(
        f"{written} volumes written, {left_out} other series left out; names are keyed with {key_file}: keep it secret"
    )
    if noted := sum(bool(facts.get("notes")) for record in result.records.values() for facts in record["chosen"]):
        print(f"{noted} volumes have notes on what may be wrong with them: see `notes` in {REPORT_NAME}")
    if retired.removed:
        print(f"{retired.removed} volumes of earlier runs removed: their series are no longer chosen")
    late = [doubt(output, retired.doubtful)] if retired.doubtful else []
    if late and result.failures:  # their verdict comes last
        print(f"warning: {late.pop()}", file=sys.stderr)
    # the console may name the input, the report, which is passed on with the results, may not
    located = {name: f"{arguments.input}: {reason}" for name, reason in result.failures.items()}
    code = summarise(replace(result, failures=located), "studies converted")
    if code == ExitCode.OK and not written:
        raise InputError(f"{arguments.input}: none of its {len(jobs)} studies holds CT: point --input at CT")
    if index.damaged and code == ExitCode.OK:
        late.append(f"{len(index.damaged)} damaged DICOM files belong to no study, the first: {index.damaged[0]}")
    for reason in late:
        print(f"error: {reason}", file=sys.stderr)
    return ExitCode.SKIPS if late else code


def doubt(output: Path, names: Sequence[str]) -> str:
    """A line on volumes of which nobody can say whether they are out of date."""
    return (
        f"{output}: {len(names)} volumes of earlier runs were left, the first: {names[0]}: their study was converted "
        "without them, or they have no JSON: remove them, or they go into training beside the others"
    )


def print_ignored(index: Index) -> None:
    """What else lay in the folders."""
    if index.not_dicom or index.not_image:
        print(f"ignored: {index.not_dicom} files that are not DICOM, {index.not_image} DICOM objects without pixels")


def write_source_table(path: Path, jobs: list[Job]) -> None:
    """The way back from a study's hash to its folders, for the hospital's own use."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["study", "folder", "files"])
    for job in jobs:
        folders = [os.path.dirname(file) for file in job.arguments["files"]]
        writer.writerows([job.name, folder, folders.count(folder)] for folder in sorted(set(folders)))
    with atomic_write(path) as handle:
        handle.write(text.getvalue().encode("utf-8", "surrogateescape"))


if __name__ == "__main__":
    args = parse_arguments()
    sys.exit(run_command(lambda: main(args), debug=args.debug))
