"""Which radiographs and reports a command is to work on, and what the results of each are called."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from errors import ConfigurationError, InputError, one_line

_SUFFIXES = {".png", ".jpg", ".jpeg", ".dcm", ".dicom"}
_MAGIC = (b"\x89PNG", b"\xff\xd8\xff")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class XRayFiles:
    """What is there of one patient.

    Attributes:
        name: of its results; unique, and safe as a file name.
        paths: radiographs, frontal first.
        report: text file, if any.
    """

    name: str
    paths: tuple[Path, ...]
    report: Path | None = None

    def text(self) -> str:
        """The report, "" where there is none.

        Raises:
            InputError: no readable text.
        """
        if self.report is None:
            return ""
        try:
            return self.report.read_text(encoding="utf-8-sig").strip()  # editors of Windows write a mark first
        except (OSError, ValueError) as error:
            raise InputError(f"{self.report}: no report in UTF-8 text ({one_line(error)})") from error


def find_xrays(source: Path, lateral: Path | None, output: Path, report: Path | None = None) -> list[XRayFiles]:
    """A file, or all radiographs in a folder and those below it, by name.

    Files count as radiographs by their content or, so that a damaged one is told, by their suffix; hidden files do
    not, nor does what lies in an output folder or a folder of lateral views within.

    Args:
        source: file or folder.
        lateral: file or folder of lateral views, in a folder of the same name as the frontal view but for the suffix.
        output: where results go.
        report: ``.txt`` file or folder of those, named in the same way.

    Raises:
        InputError: nothing there, or a folder of lateral views or reports of which none has a radiograph's name.
        ConfigurationError: results would lie among the radiographs, both views are in one folder, or one of the sources
            is a file, another a folder.
    """
    source, output = source.expanduser(), output.expanduser()
    lateral, report = (other and other.expanduser() for other in (lateral, report))
    if not source.exists():
        raise InputError(f"{source}: not there: give a radiograph or a folder of them")
    for other, what in ((lateral, "lateral radiograph"), (report, "report")):
        if other is not None and not other.exists():
            raise InputError(f"{other}: not there: give the {what}, or the folder of them")
        if other is not None and other.is_dir() != source.is_dir():
            raise ConfigurationError(f"{other}: give files only, or folders only")
    if not source.is_dir():
        return [XRayFiles(_name(Path(source.stem)), tuple(p for p in (source, lateral) if p is not None), report)]
    for folder in (source, lateral):
        if folder is not None and _within(output, folder) == Path():
            raise ConfigurationError(f"{output}: holds the radiographs: choose another --output")
    if lateral is not None and _within(lateral, source) == Path():
        raise ConfigurationError(f"{lateral}: holds the frontal radiographs: give the lateral ones another")
    found = _radiographs(source, output, lateral)
    if not found:
        raise InputError(f"{source}: holds no PNG, JPEG or DICOM: give a radiograph or a folder of them")
    names = {path: _name(path.relative_to(source).with_suffix("")) for path in found}
    twice = {name for name, count in Counter(names.values()).items() if count > 1}
    laterals = {} if lateral is None else _by_stem(lateral, _radiographs(lateral, output))
    reports = {} if report is None else _by_stem(report, _texts(report))
    stems = {path.relative_to(source).with_suffix("") for path in found}
    for folder, beside, what in ((lateral, laterals, "radiograph"), (report, reports, ".txt")):
        if folder is not None and not stems & beside.keys():
            raise InputError(
                f"{folder}: holds no {what} named as a radiograph in {source}, such as {min(stems)}: rename them"
            )
    jobs = []
    for path, name in names.items():
        if name in twice:
            name = f"{name}-{hashlib.sha256(str(path.relative_to(source)).encode()).hexdigest()[:8]}"
        stem = path.relative_to(source).with_suffix("")
        views = (path, laterals[stem]) if stem in laterals else (path,)
        jobs.append(XRayFiles(name, views, reports.get(stem)))
    return jobs


def _by_stem(folder: Path, paths: Iterable[Path]) -> dict[Path, Path]:
    return {path.relative_to(folder).with_suffix(""): path for path in paths}


def _texts(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.suffix.lower() == ".txt" and path.is_file()]


def _within(inner: Path, folder: Path) -> Path | None:
    """Where a path lies in a folder; None: not inside it."""
    inner, folder = inner.resolve(), folder.resolve()
    return inner.relative_to(folder) if inner.is_relative_to(folder) else None


def _radiographs(folder: Path, *others: Path | None) -> list[Path]:
    """Those in a folder, but not in those ``others`` that lie within it (what lies above it would hide them all)."""
    apart = [place for other in others if other is not None and (place := _within(other, folder)) is not None]
    candidates = (
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not any(path.relative_to(folder).is_relative_to(place) for place in apart)
    )
    return [path for path in candidates if path.suffix.lower() in _SUFFIXES or _looks_like_one(path)]


def _looks_like_one(path: Path) -> bool:
    try:
        with open(path, "rb") as handle:
            head = handle.read(132)
    except OSError:
        return False
    return head.startswith(_MAGIC) or head[128:] == b"DICM"


def _name(relative: Path) -> str:
    # 160 of the 255 bytes of a file name: results add a suffix
    return _UNSAFE.sub("_", "-".join(relative.parts))[:160].lstrip(".") or "xray"
