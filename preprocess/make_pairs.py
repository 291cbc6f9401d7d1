"""Join converted CTs with their radiographs, labels and splits: the table that `dataset=xray_ctpa` trains on.

python preprocess/make_pairs.py --input data/baseline --xrays data/drr --output data/pairs.csv
python preprocess/make_pairs.py --input data/baseline --xrays data/drr --output data/pairs.csv --held-out-xrays data/new
python preprocess/make_pairs.py --input data/baseline --xrays data/drr --output data/pairs.csv --patients patients.csv

Every volume below --input (store or NIfTI) becomes a row. Its radiograph is the patient's own where --patients names
one, else the rendered ones of render_drr.py, which have the same place and stem below --xrays (frontal, and lateral
where it is there). The table of patients has the columns patient, xray, label and split, all but the first optional;
patients are called as in their DICOM headers (the key of the conversion finds their hashed names) or, where the volumes
were NIfTI already, by the stem of the file. Splits are given for all patients or for none; where nobody gave them, a
share is held out for validation by hash, two at least, and with --test another that no training sees. The split column
of the result overrules dataset.validation_fraction and dataset.test_fraction.
"""

from __future__ import annotations

import argparse
import csv
import io
import logging
import os
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from dataset.atomic import atomic_write, make_folder
from dataset.pairs_case import named_patient, volume_stem, warn_of_nameless
from dataset.pairs_keys import pseudonym, read_key
from dataset.pairs_table import read_pairs, table_rows
from dataset.splits import SPLIT_NAMES, TEST, TRAIN, VALIDATION, hash_fraction
from dataset.xray_drr import sidecar_of
from errors import ConfigurationError, ExitCode, InputError, StorageError, run_command
from preprocess.batch import absolute_path
from preprocess.volume_tree import named_volumes

log = logging.getLogger(__name__)
# Radiographs are exchanged among held-out patients to see what they are worth, so there must be two.
LEAST_HELD_OUT = 2
# Rendered pictures tell their view, so that laterals need no column of their own.
_WRITTEN_COLUMNS = ("patient", "ct", "xray", "label", "split")
_PATIENT_COLUMNS = ("patient", "xray", "label", "split")


@dataclass(frozen=True)
class Row:
    """A volume with its radiographs, the frontal or the patient's own one first; label and split as in the table."""

    patient: str
    ct: Path
    xrays: tuple[Path, ...]
    label: str
    split: str


def read_patients(path: Path, key: bytes | None, known: Collection[str]) -> dict[str, dict[str, str]]:
    """Rows of a table of patients by the name that the conversion gave them; radiographs as absolute paths.

    Args:
        path: the CSV.
        key: of the conversion; None where names were not hashed.
        known: patients of the volumes; who is called so in the table is not hashed once more.

    Raises:
        InputError: no such table, a patient without a name or in two rows, an unknown split, a radiograph that is
            missing, or no patient who has a volume.
    """
    patients: dict[str, dict[str, str]] = {}
    for row, cells in table_rows(path, _PATIENT_COLUMNS, ("patient",)):
        if not (name := cells["patient"]):
            raise InputError(f"{path}: row {row}: the patient cell is empty: every row needs a patient")
        if xray := cells.get("xray", ""):
            cells["xray"] = os.path.normpath(path.parent.absolute() / Path(xray).expanduser())
            if not os.path.exists(cells["xray"]):
                raise InputError(f"{path}: row {row}: {xray} is missing: relative paths start at the table's folder")
        hashed = name if key is None or name in known else pseudonym(key, "patient", name)
        if split := cells.get("split", ""):
            if split.lower() not in SPLIT_NAMES:
                raise InputError(f"{path}: row {row}: split {split!r}: train, validation and test are known")
            cells["split"] = SPLIT_NAMES[split.lower()]
        if hashed in patients:
            raise InputError(f"{path}: row {row}: this patient has a row already: keep one")
        patients[hashed] = cells
    if patients.keys().isdisjoint(known):
        named = (
            "hashed with another key" if key is not None else "stems of files, or need --key, that of the conversion"
        )
        raise InputError(f"{path}: none of its {len(patients)} patients has a volume: names are {named}")
    return patients


def owners_of(volumes: dict[str, Path], root: Path) -> dict[str, str]:
    """The patient of each volume: whom its sidecar names, else the stem of the file, with a warning."""
    named = {name: named_patient(path) for name, path in volumes.items()}
    warn_of_nameless(str(root), list(named.values()))
    return {name: patient or volume_stem(volumes[name]) for name, patient in named.items()}


def splits_by_hash(patients: Iterable[str], validation: float, test: float = 0.0) -> dict[str, str]:
    """A split for each patient, by hash: the lowest hashes are for validation, the highest for the test.

    Adding patients moves nobody, but for those who fill up a share that few patients leave too small; that is logged.

    Args:
        patients: their names.
        validation: share held out, two patients at least.
        test: share that no training sees.

    Raises:
        InputError: fewer than three patients.
    """
    order = sorted(set(patients), key=hash_fraction)
    if len(order) <= LEAST_HELD_OUT:
        raise InputError(
            f"{len(order)} patient(s): {LEAST_HELD_OUT + 1} are needed, {LEAST_HELD_OUT} of them held out: add volumes"
        )
    by_hash = sum(hash_fraction(patient) < validation for patient in order)
    tested_by_hash = sum(hash_fraction(patient) >= 1 - test for patient in order)
    held_out = min(max(by_hash, LEAST_HELD_OUT), len(order) - 1)
    tested = min(tested_by_hash, len(order) - 1 - held_out)
    if (held_out, tested) != (by_hash, tested_by_hash):
        log.warning(
            "%d patients are few: the hash gives %d for validation and %d for the test, %d and %d are taken; with more "
            "patients some may change sides", len(order), by_hash, tested_by_hash, held_out, tested,
        )  # fmt: skip
    first_test = len(order) - tested
    return {
        patient: VALIDATION if number < held_out else TRAIN if number < first_test else TEST
        for number, patient in enumerate(order)
    }


def given_splits(owners: Iterable[str], patients: dict[str, dict[str, str]]) -> dict[str, str]:
    """The split that the table of patients gives each owner of a volume; {} where it gives none to anybody.

    Raises:
        InputError: an owner without a split while others have one: nobody knows which side was meant.
    """
    if not any(cells.get("split") for cells in patients.values()):
        return {}
    splits = {owner: patients.get(owner, {}).get("split", "") for owner in owners}
    if without := sorted(owner for owner, split in splits.items() if not split):
        raise InputError(
            f"{len(without)} of {len(splits)} patients with volumes have no split in --patients while others have one, "
            f"the first: {without[0]}: give them one, correct their names or --key, or leave the column out"
        )
    return splits


def join(
    volumes: dict[str, Path],
    owners: dict[str, str],
    drr: Path,
    patients: dict[str, dict[str, str]],
    validation: float,
    test: float,
) -> tuple[dict[str, Row], dict[str, Path]]:
    """Rows of the pairs table, in the order of the volumes, and what had to be left out.

    Args:
        volumes: by their place below the input, as `named_volumes` gives them.
        owners: the patient of each.
        drr: folder of rendered radiographs.
        patients: as `read_patients` gives them; may be empty.
        validation: share of the patients to hold out where no split is given.
        test: share that no training sees where no split is given.

    Returns:
        A row for each volume, by its place, and for each volume without a radiograph where that should be.

    Raises:
        InputError: too few patients, or one without a split while others have one.
    """
    xrays = {name: _radiographs(name, drr, patients.get(owner, {}).get("xray")) for name, owner in owners.items()}
    missing = {name: first for name, (first, *_) in xrays.items() if not first.exists()}
    kept = {name: owner for name, owner in owners.items() if name not in missing}
    if missing and not kept:
        raise InputError(f"{drr}: no radiograph of any of {len(volumes)} volumes: run preprocess/render_drr.py")
    splits = given_splits(kept.values(), patients) or splits_by_hash(kept.values(), validation, test)
    rows = {
        name: Row(owner, volumes[name], xrays[name], patients.get(owner, {}).get("label", ""), splits[owner])
        for name, owner in kept.items()
    }
    return rows, missing


def _radiographs(name: str, drr: Path, own: str | None) -> tuple[Path, ...]:
    """The patient's own, else the rendered ones: frontal, there or not, and lateral if it is there."""
    if own:
        return (Path(own),)
    frontal, lateral = (drr / f"{name}_{view}.png" for view in ("frontal", "lateral"))
    return (frontal, lateral) if lateral.is_file() else (frontal,)


def write_pairs(path: Path, rows: Iterable[Row]) -> None:
    """Write the table; files are named by their way from its folder, so that all of it can move together."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_WRITTEN_COLUMNS)
    for row in rows:
        ct, *xrays = (os.path.relpath(file, path.parent) for file in (row.ct, *row.xrays))
        writer.writerow((row.patient, ct, ";".join(xrays), row.label, row.split))
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
    parser.add_argument(
        "--key", type=absolute_path, help="key of dicom_to_nifti.py, for the names in --patients (default: INPUT.key)"
    )
    parser.add_argument("--held-out", type=float, default=0.2, help="share for validation by hash (default: 0.2)")
    parser.add_argument("--test", type=float, default=0.0, help="share for the test by hash (default: 0, none)")
    parser.add_argument(
        "--held-out-xrays", type=absolute_path, metavar="DIR", help="fill a folder with links to validation radiographs"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> int:
    """Write the table and read it back; exit 4 if volumes without a radiograph were left out."""
    from dataset.pairs import describe

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.DEBUG if arguments.debug else None)
    validation, test = arguments.held_out, arguments.test
    if not (0 < validation < 1 and 0 <= test < 1 - validation):
        raise ConfigurationError(f"--held-out {validation} --test {test}: shares of the patients, together below 1")
    if arguments.key is not None and arguments.patients is None:
        raise ConfigurationError("--key finds the names in --patients: give both or none")
    volumes = named_volumes(arguments.input)
    owners = owners_of(volumes, arguments.input)
    patients: dict[str, dict[str, str]] = {}
    if arguments.patients is not None:
        patients = read_patients(arguments.patients, read_key(arguments.key, arguments.input), set(owners.values()))
    rows, missing = join(volumes, owners, arguments.xrays, patients, validation, test)
    write_pairs(arguments.output, rows.values())
    cases = read_pairs(arguments.output)
    print(f"{describe(cases)}; table: {arguments.output}")
    if unmatched := len(patients) - len(patients.keys() & {row.patient for row in rows.values()}):
        print(f"{unmatched} of {len(patients)} patients in {arguments.patients.name} have no volume here")
    if arguments.held_out_xrays is not None:
        pictures = {name: row.xrays[0] for name, row in rows.items() if row.split == VALIDATION}
        link_radiographs(arguments.held_out_xrays, pictures)
        print(f"{len(pictures)} held-out radiographs: {arguments.held_out_xrays}")
    for name, xray in missing.items():
        print(f"left out {name}: {xray} is not there: render it with preprocess/render_drr.py", file=sys.stderr)
    return ExitCode.SKIPS if missing else ExitCode.OK


if __name__ == "__main__":
    args = parse_arguments()
    sys.exit(run_command(lambda: main(args), debug=args.debug))
