"""Join converted CTs with their radiographs, labels and splits: the table that `dataset=xray_ctpa` trains on.

python preprocess/make_pairs.py --input data/baseline --xrays data/drr --output data/pairs.csv
python preprocess/make_pairs.py --input data/baseline --xrays data/drr --output data/pairs.csv --held-out-xrays data/new
python preprocess/make_pairs.py --input data/baseline --xrays data/drr --output data/pairs.csv --patients patients.csv

Every volume below --input (store or NIfTI) becomes a row. Its radiograph is the patient's own where --patients names
one, else the rendered one of render_drr.py, which has the same place and stem below --xrays. The table of patients has
the columns patient, xray, label and split, all but the first optional; patients are called as in their DICOM headers
(the key of the conversion finds their hashed names) or, where the volumes were NIfTI already, by the stem of the file.
Where nobody gave splits, a share of the patients is held out by hash, two at least.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from dataset.atomic import atomic_write, make_folder
from dataset.pairs_case import patient_of
from dataset.pairs_keys import pseudonym, read_key
from dataset.pairs_table import COLUMNS, read_pairs, table_rows
from dataset.splits import SPLIT_NAMES, TRAIN, VALIDATION, hash_fraction
from dataset.xray_drr import sidecar_of
from errors import ConfigurationError, ExitCode, InputError, StorageError, run_command
from preprocess.batch import absolute_path
from preprocess.volume_tree import named_volumes

# Radiographs are exchanged among held-out patients to see what they are worth, so there must be two.
LEAST_HELD_OUT = 2
_PATIENT_COLUMNS = ("patient", "xray", "label", "split")


def read_patients(path: Path, key: bytes | None) -> dict[str, dict[str, str]]:
    """Rows of a table of patients by the name that the conversion gave them; radiographs as absolute paths.

    Args:
        path: the CSV.
        key: of the conversion; None where names were not hashed.

    Raises:
        InputError: no such table, a patient without a name or in two rows, or a radiograph that is missing.
    """
    patients: dict[str, dict[str, str]] = {}
    for row, cells in table_rows(path, _PATIENT_COLUMNS, ("patient",)):
        if not (name := cells["patient"]):
            raise InputError(f"{path}: row {row}: the patient cell is empty: every row needs a patient")
        if xray := cells.get("xray", ""):
            cells["xray"] = os.path.normpath(path.parent.absolute() / Path(xray).expanduser())
            if not os.path.exists(cells["xray"]):
                raise InputError(f"{path}: row {row}: {xray} is missing: relative paths start at the table's folder")
        hashed = name if key is None else pseudonym(key, "patient", name)
        cells["split"] = SPLIT_NAMES.get(cells.get("split", "").lower(), cells.get("split", ""))
        if hashed in patients:
            raise InputError(f"{path}: row {row}: this patient has a row already: keep one")
        patients[hashed] = cells
    return patients


def splits_by_hash(patients: Iterable[str], fraction: float) -> dict[str, str]:
    """Train or validation for each patient, by hash: the share, two at least, that the smallest fractions would take.

    Raises:
        InputError: fewer than three patients.
    """
    order = sorted(set(patients), key=hash_fraction)
    if len(order) <= LEAST_HELD_OUT:
        raise InputError(
            f"{len(order)} patient(s): {LEAST_HELD_OUT + 1} are needed, {LEAST_HELD_OUT} of them held out: add volumes"
        )
    held_out = sum(hash_fraction(patient) < fraction for patient in order)
    count = min(max(held_out, LEAST_HELD_OUT), len(order) - 1)
    return {patient: VALIDATION if number < count else TRAIN for number, patient in enumerate(order)}


def join(
    volumes: dict[str, Path], drr: Path, patients: dict[str, dict[str, str]], fraction: float
) -> tuple[dict[str, list[str]], dict[str, Path]]:
    """Rows of the pairs table, in the order of the volumes, and what had to be left out.

    Args:
        volumes: by their place below the input, as `named_volumes` gives them.
        drr: folder of rendered radiographs.
        patients: as `read_patients` gives them; may be empty.
        fraction: of the patients to hold out where no split is given.

    Returns:
        A row for each volume, by its place, and for each volume without a radiograph where that should be.

    Raises:
        InputError: too few patients.
    """
    owners = {name: patient_of(path) for name, path in volumes.items()}
    xrays = {name: Path(patients.get(owner, {}).get("xray") or drr / f"{name}_frontal.png")
             for name, owner in owners.items()}  # fmt: skip
    missing = {name: xray for name, xray in xrays.items() if not xray.exists()}
    kept = {name: owner for name, owner in owners.items() if name not in missing}
    if missing and not kept:
        raise InputError(f"{drr}: no radiograph of any of {len(volumes)} volumes: run preprocess/render_drr.py")
    if any(cells.get("split") for cells in patients.values()):
        splits = {owner: patients.get(owner, {}).get("split") or TRAIN for owner in kept.values()}
    else:
        splits = splits_by_hash(kept.values(), fraction)
    rows = {
        name: [owner, str(volumes[name]), str(xrays[name]), patients.get(owner, {}).get("label", ""), "", splits[owner]]
        for name, owner in kept.items()
    }
    return rows, missing


def write_pairs(path: Path, rows: Iterable[list[str]]) -> None:
    """Write the table; files are named by their way from its folder, so that all of it can move together."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for patient, ct, xray, *rest in rows:
        writer.writerow((patient, *(os.path.relpath(file, path.parent) for file in (ct, xray)), *rest))
    make_folder(path.parent)
    with atomic_write(path) as handle:
        handle.write(text.getvalue().encode())


def link_radiographs(folder: Path, pictures: dict[str, Path]) -> None:
    """Fill a folder with links to radiographs, named as their volumes; other links in it are removed.

    Links, because a copy of a hospital's file would copy what its header says of the patient.

    Raises:
        StorageError: the folder cannot be written.
    """
    make_folder(folder)
    wanted = {}
    for name, picture in pictures.items():
        base = name.replace("/", "_")
        wanted[f"{base}{picture.suffix}"] = picture
        if sidecar_of(picture).is_file():
            wanted[f"{base}.json"] = sidecar_of(picture)
    try:
        for path in folder.iterdir():
            if path.is_symlink():
                path.unlink()
        for link, file in wanted.items():
            (folder / link).symlink_to(os.path.relpath(file, folder.resolve()))
    except OSError as error:
        raise StorageError(f"{folder}: not written ({error.strerror}): give another --held-out-xrays") from error


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=absolute_path, required=True, help="folder of stores or NIfTI volumes")
    parser.add_argument("--xrays", type=absolute_path, required=True, help="folder of render_drr.py")
    parser.add_argument("--output", type=absolute_path, required=True, help="the table, a .csv")
    parser.add_argument("--patients", type=absolute_path, metavar="CSV", help="own radiographs, labels and splits")
    parser.add_argument("--key", type=absolute_path, help="key of dicom_to_nifti.py, for the names in --patients")
    parser.add_argument("--held-out", type=float, default=0.2, help="share of patients by hash (default: 0.2)")
    parser.add_argument(
        "--held-out-xrays", type=absolute_path, metavar="DIR", help="fill a folder with held-out radiographs, as links"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> int:
    """Write the table and read it back; exit 4 if volumes without a radiograph were left out."""
    from dataset.pairs import describe

    if not 0 < arguments.held_out < 1:
        raise ConfigurationError(f"--held-out {arguments.held_out}: a share of the patients is between 0 and 1")
    if arguments.key is not None and arguments.patients is None:
        raise ConfigurationError("--key finds the names in --patients: give both or none")
    volumes = named_volumes(arguments.input)
    patients: dict[str, dict[str, str]] = {}
    if arguments.patients is not None:
        key = read_key(arguments.key, arguments.input) if arguments.key is not None else None
        patients = read_patients(arguments.patients, key)
    rows, missing = join(volumes, arguments.xrays, patients, arguments.held_out)
    write_pairs(arguments.output, rows.values())
    cases = read_pairs(arguments.output)
    print(f"{describe(cases)}; table: {arguments.output}")
    if unmatched := len(patients) - len(patients.keys() & {row[0] for row in rows.values()}):
        print(f"{unmatched} of {len(patients)} patients in {arguments.patients.name} have no volume here")
    if arguments.held_out_xrays is not None:
        pictures = {name: Path(row[2]) for name, row in rows.items() if row[5] == VALIDATION}
        link_radiographs(arguments.held_out_xrays, pictures)
        print(f"{len(pictures)} held-out radiographs: {arguments.held_out_xrays}")
    for name, xray in missing.items():
        print(f"left out {name}: {xray} is not there: render it with preprocess/render_drr.py", file=sys.stderr)
    return ExitCode.SKIPS if missing else ExitCode.OK


if __name__ == "__main__":
    args = parse_arguments()
    sys.exit(run_command(lambda: main(args), debug=args.debug))
