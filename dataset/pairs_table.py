"""The pairs table: one CSV that says which CT, X-rays, label, report and split belong together.

Columns, in any order (a header row, commas, UTF-8):

- ``patient`` (needed): whose volume it is; splits go by it.
- ``ct`` (needed): .nii, .nii.gz or .b2nd.
- ``xray``: several in one cell, parted by ``;``, or by repeated rows of the same CT; empty: rendered on demand.
- ``lateral``: lateral views, like ``xray``; a PNG or JPEG in ``xray`` is taken as frontal, since it tells no view.
- ``label``: pulmonary embolism: yes/no, true/false, 1/0, positive/negative; empty: unknown.
- ``report``: the text, or the path of a .txt file.
- ``split``: train, validation or test, for every row or for none.

Relative paths start at the CSV's folder. Rows are counted as in a spreadsheet: the header is row 1.
"""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dataset.pairs_case import CTCase, case_name, with_unique_names
from dataset.splits import SPLIT_NAMES
from dataset.verification import VOLUME_SUFFIXES
from errors import InputError, one_line

log = logging.getLogger(__name__)

COLUMNS = ("patient", "ct", "xray", "lateral", "label", "report", "split")
_NEEDED = ("patient", "ct")
_LABELS = {
    **dict.fromkeys(("yes", "true", "1", "positive", "pos", "y", "t"), True),
    **dict.fromkeys(("no", "false", "0", "negative", "neg", "n", "f"), False),
}
_MAX_REPORT_BYTES = 1 << 20
# Problems that are logged one by one before the first is raised; a wrong folder makes one of every row.
_MAX_LOGGED = 20


@dataclass
class _Examination:
    """The rows of one CT, merged."""

    patient: str
    ct: Path
    row: int
    given: dict[str, tuple[object, int]]  # label, report, split: value and the row that said it
    xrays: list[Path] = field(default_factory=list)
    laterals: list[Path] = field(default_factory=list)


class _RowError(Exception):
    """What is wrong with a row; the table adds file and number."""


def read_pairs(path: str | os.PathLike[str]) -> list[CTCase]:
    """Read a pairs table; every file that it names exists afterwards.

    Args:
        path: the CSV.

    Returns:
        One case per CT, in the order of their first rows; ``split`` as the column says.

    Raises:
        InputError: no table, unknown or missing columns, or rows that are incomplete, repeated, contradictory or name
            missing files; all of them are logged, the first is raised.
    """
    path = Path(path)
    table = _Table(path.parent)
    problems: list[str] = []
    for row, cells in table_rows(path, COLUMNS, _NEEDED):
        try:
            table.add(row, cells)
        except _RowError as error:
            problems.append(f"{path}: row {row}: {one_line(error)}")
    problems += [f"{path}: {problem}" for problem in (*table.view_problems(), *table.split_problems())]
    if problems:
        for problem in problems[:_MAX_LOGGED]:
            log.error("%s", problem)
        more = f" (and {len(problems) - 1} more rows with problems)" if len(problems) > 1 else ""
        raise InputError(problems[0] + more)
    if not table.examinations:
        raise InputError(f"{path}: holds no row below its header: add one row per CT")
    return with_unique_names(table.cases())


def table_rows(
    path: Path, known: tuple[str, ...] | None, needed: tuple[str, ...]
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (row number, cells by column) of a CSV; rows without any text are left out.

    Args:
        path: the CSV; the header is row 1.
        known: columns that may occur; None allows any.
        needed: columns that must occur.

    Raises:
        InputError: not readable, no usable header, or a row of another length.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            header = [name.strip() for name in next(reader, [])]
            _check_header(path, header, known, needed)
            for row, raw in enumerate(reader, start=2):
                cells = list(map(str.strip, raw))  # RSPECT has 1.8 million rows
                if not any(cells):
                    continue
                if len(cells) != len(header):
                    raise InputError(
                        f"{path}: row {row}: {len(cells)} cells under {len(header)} columns: "
                        'put cells that hold commas in "quotation marks"'
                    )
                yield row, dict(zip(header, cells, strict=True))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): give an existing .csv file") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: no CSV in UTF-8 ({one_line(error)}): save it as 'CSV UTF-8'") from error


def _check_header(path: Path, header: list[str], known: tuple[str, ...] | None, needed: tuple[str, ...]) -> None:
    columns = f"columns are {', '.join(known or needed)}"
    if missing := [name for name in needed if name not in header]:
        commas = ", cells are parted by commas" if len(header) == 1 else ""
        raise InputError(f"{path}: column {', '.join(missing)} is missing: {columns}{commas}")
    if known and (unknown := sorted(set(header) - set(known))):
        raise InputError(f"{path}: unknown column {', '.join(name or '(empty)' for name in unknown)}: {columns}")
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise InputError(f"{path}: column {', '.join(twice)} occurs twice: keep one")


class _Table:
    """Rows merged by CT, checked against each other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.examinations: dict[Path, _Examination] = {}
        self.xray_owners: dict[Path, tuple[str, int]] = {}

    def add(self, row: int, cells: dict[str, str]) -> None:
        """Take a row in, or raise what is wrong with it."""
        patient = cells["patient"]
        if not patient or not cells["ct"]:
            raise _RowError(f"the {'ct' if patient else 'patient'} cell is empty: every row needs a patient and a CT")
        ct = self.existing(cells["ct"])
        if not ct.name.lower().endswith(VOLUME_SUFFIXES):
            raise _RowError(f"{ct} is no volume: a CT is a .nii, .nii.gz or .b2nd file")
        xrays, laterals = (
            [self.existing(part.strip()) for part in cells.get(column, "").split(";") if part.strip()]
            for column in ("xray", "lateral")
        )
        given: dict[str, tuple[object, int]] = {}
        for column, parse in (("label", _label), ("split", _split), ("report", self.report)):
            if cells.get(column):
                given[column] = (parse(cells[column]), row)
        known = self.examinations.get(ct)
        if known is not None:
            self.check_repeated(known, patient, ct, xrays + laterals, given)
        self.check_xrays(xrays + laterals, patient, row, known)
        if known is None:
            self.examinations[ct] = _Examination(patient, ct, row, given, xrays, laterals)
        else:
            known.xrays += xrays
            known.laterals += laterals
            known.given |= given

    @staticmethod
    def check_repeated(
        known: _Examination, patient: str, ct: Path, xrays: list[Path], given: dict[str, tuple[object, int]]
    ) -> None:
        """A row of a CT that came before must agree with it and add an X-ray."""
        if patient != known.patient:
            raise _RowError(
                f"{ct} belongs to patient {known.patient} in row {known.row}, here to {patient}: correct one"
            )
        for column, (value, _) in given.items():
            if column in known.given and known.given[column][0] != value:
                first, first_row = known.given[column]
                told = f" ({_told(value)}, there {_told(first)})" if column != "report" else ""
                raise _RowError(f"the {column} contradicts row {first_row} of the same CT{told}: correct one")
        if not xrays:
            raise _RowError(f"repeats row {known.row} ({ct}) and adds no X-ray: remove one")

    def check_xrays(self, xrays: list[Path], patient: str, row: int, known: _Examination | None) -> None:
        """An X-ray occurs once per CT, and never with two patients."""
        if len(set(xrays)) < len(xrays):
            raise _RowError("names an X-ray twice: remove one")
        for xray in xrays:
            if known is not None and xray in (*known.xrays, *known.laterals):
                raise _RowError(f"repeats {xray} of the same CT (row {known.row}): remove one")
            owner, owner_row = self.xray_owners.setdefault(xray, (patient, row))
            if owner != patient:
                raise _RowError(f"{xray} belongs to patient {owner} in row {owner_row}, here to {patient}: correct one")

    def existing(self, text: str) -> Path:
        """An absolute path without ``..``, of a file that is there."""
        path = Path(os.path.normpath(self.folder.absolute() / Path(text).expanduser()))
        if not os.path.exists(path):  # unlike Path.exists, no error for a name that is too long
            raise _RowError(f"{path} is missing: relative paths start at the table's folder")
        return path

    def report(self, text: str) -> str:
        """The text of a report, read from its file where the cell names one."""
        if not text.lower().endswith(".txt") or "\n" in text:
            return text
        path = self.existing(text)
        try:
            if path.stat().st_size > _MAX_REPORT_BYTES:
                raise ValueError("larger than 1 MiB")
            return path.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise _RowError(f"{path} is no report in UTF-8 text ({one_line(error)})") from error

    def view_problems(self) -> list[str]:
        """CTs of which only a lateral view is named."""
        return [
            f"row {case.row}: a lateral view and no frontal one: name that in xray, or leave both to be rendered"
            for case in self.examinations.values()
            if case.laterals and not case.xrays
        ]

    def split_problems(self) -> list[str]:
        """Patients on two sides, and rows without a split among rows that have one."""
        problems = []
        first: dict[str, tuple[object, int]] = {}
        cases = self.examinations.values()
        some = any("split" in case.given for case in cases)
        for case in cases:
            if not some:
                break
            if "split" not in case.given:
                problems.append(f"row {case.row}: the split cell is empty while others are filled: fill all or none")
                continue
            split, row = case.given["split"]
            other, other_row = first.setdefault(case.patient, (split, row))
            if other != split:
                problems.append(
                    f"row {row}: patient {case.patient} is in {split}, but in {other} in row {other_row}: "
                    "all volumes of a patient belong into one split"
                )
        return problems

    def cases(self) -> Iterator[CTCase]:
        """The merged rows."""
        for examination in self.examinations.values():
            value = {column: told for column, (told, _) in examination.given.items()}
            yield CTCase(
                case_name(examination.patient, examination.ct),
                examination.patient,
                examination.ct,
                tuple(examination.xrays),
                value.get("label"),  # type: ignore[arg-type]
                value.get("report"),  # type: ignore[arg-type]
                value.get("split"),  # type: ignore[arg-type]
                tuple(examination.laterals),
            )


def _label(text: str) -> bool:
    if text.lower() not in _LABELS:
        raise _RowError(f"label {text!r}: yes, no or empty are known")
    return _LABELS[text.lower()]


def _split(text: str) -> str:
    if text.lower() not in SPLIT_NAMES:
        raise _RowError(f"split {text!r}: train, validation and test are known")
    return SPLIT_NAMES[text.lower()]


def _told(value: object) -> str:
    return "yes" if value is True else "no" if value is False else str(value)
