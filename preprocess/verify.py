"""Check every NIfTI file and store below a folder: header, shape, affine, finite voxels, air, checksums.

python preprocess/verify.py --input data/stores

Bad files come in one table, and the exit code is 3. Good ones are remembered by size and time, so that the next run
over thousands of files takes seconds.
"""

from __future__ import annotations

import argparse
import csv
import io
import logging
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from dataset.atomic import atomic_write, make_folder
from dataset.verification import BadFile, find_volumes, kind_of, verify_files
from errors import ConfigurationError, ExitCode, run_command
from preprocess.batch import absolute_path

CACHE_NAME = "verified.json"


def table(bad: list[BadFile]) -> str:
    """The bad files as aligned columns: path, kind, reason."""
    rows = [(entry.path, entry.kind, entry.reason.removeprefix(f"{entry.path}: ")) for entry in bad]
    width = max(len(path) for path, _, _ in rows)
    return "\n".join(
        f"{path:<{width}}  {kind:<5}  {reason}" for path, kind, reason in [("path", "kind", "reason"), *rows]
    )


def write_table(folder: Path, bad: list[BadFile]) -> Path:
    """Write ``bad_files.csv`` (only its heading where all is well), and return its path."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("path", "kind", "reason"))
    writer.writerows((entry.path, entry.kind, entry.reason) for entry in bad)
    path = folder / "bad_files.csv"
    make_folder(folder)
    with atomic_write(path) as handle:
        handle.write(text.getvalue().encode())
    return path


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=absolute_path, required=True, help="folder to search, or one file")
    parser.add_argument("--output", type=absolute_path, help="folder for the table as bad_files.csv (default: printed)")
    parser.add_argument("--cache", type=absolute_path, help="JSON file that remembers good files (default: the user's)")
    parser.add_argument("--threads", type=int, default=2, help="files checked at the same time (default: 2)")
    parser.add_argument("--allow-no-air", action="store_true", help="take crops of tissue, without a voxel of air")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> int:
    """Verify a folder; exit 3 if a file is bad."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    if arguments.threads < 1:
        raise ConfigurationError(f"--threads {arguments.threads}: give a positive number")
    cache = arguments.cache
    if cache is None:
        from dataset.sources import default_cache  # loads the phantoms, too

        cache = default_cache() / CACHE_NAME
    begin = time.monotonic()
    paths = find_volumes(arguments.input)
    bad = [
        replace(entry, reason=f"{entry.reason}, or give --allow-no-air") if entry.without_air else entry
        for entry in verify_files(paths, cache, threads=arguments.threads)
        if not (entry.without_air and arguments.allow_no_air)
    ]
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(map(kind_of, paths)).items()))
    if arguments.output:
        print(f"table: {write_table(arguments.output, bad)}")
    if bad:
        print(table(bad))
    print(
        f"{len(paths) - len(bad)} of {len(paths)} files are good ({kinds}) in {time.monotonic() - begin:.1f} s",
        flush=True,
    )
    if bad:
        what = f"{len(bad)} of {len(paths)} files are bad, the first: " if len(bad) > 1 else ""
        print(f"error: {what}{bad[0].reason}", file=sys.stderr)
        return ExitCode.BAD_INPUT
    return ExitCode.OK


if __name__ == "__main__":
    args = parse_arguments()
    sys.exit(run_command(lambda: main(args), debug=args.debug))
