"""Which radiographs a command is to work on, and what the results of each are called."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from errors import ConfigurationError, InputError

_SUFFIXES = {".png", ".jpg", ".jpeg", ".dcm", ".dicom"}
_MAGIC = (b"\x89PNG", b"\xff\xd8\xff")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class XRayFiles:
    """The radiographs of one patient.

    Attributes:
        name: of its results; unique, and safe as a file name.
        paths: frontal first.
    """

    name: str
    paths: tuple[Path, ...]


def find_xrays(source: Path, lateral: Path | None, output: Path) -> list[XRayFiles]:
    """A file, or all radiographs in a folder and those below it, by name.

    Files count as radiographs by their content or, so that a damaged one is told, by their suffix; hidden files and
    what lies in the output folder do not.

    Args:
        source: file or folder.
        lateral: file or folder of lateral views, in a folder of the same name as the frontal view but for the suffix.
        output: where results go.

    Raises:
        InputError: nothing there.
        ConfigurationError: results would lie among the radiographs, or one of ``source`` and ``lateral`` is a folder.
    """
    source, output = source.expanduser(), output.expanduser().absolute()
    if not source.exists():
        raise InputError(f"{source}: not there: give a radiograph or a folder of them")
    if lateral is not None and not lateral.exists():
        raise InputError(f"{lateral}: not there: give the lateral radiograph, or the folder of them")
    if lateral is not None and lateral.is_dir() != source.is_dir():
        raise ConfigurationError(f"{lateral}: give two files or two folders")
    if not source.is_dir():
        return [XRayFiles(_name(Path(source.stem)), tuple(p for p in (source, lateral) if p is not None))]
    if output == source.absolute():
        raise ConfigurationError(f"{output}: holds the radiographs: choose another --output")
    found = _radiographs(source, output)
    if not found:
        raise InputError(f"{source}: holds no PNG, JPEG or DICOM: give a radiograph or a folder of them")
    names = {path: _name(path.relative_to(source).with_suffix("")) for path in found}
    twice = {name for name, count in Counter(names.values()).items() if count > 1}
    by_stem = (
        {} if lateral is None else {p.relative_to(lateral).with_suffix(""): p for p in _radiographs(lateral, output)}
    )
    jobs = []
    for path, name in names.items():
        if name in twice:
            name = f"{name}-{hashlib.sha256(str(path.relative_to(source)).encode()).hexdigest()[:8]}"
        beside = by_stem.get(path.relative_to(source).with_suffix(""))
        jobs.append(XRayFiles(name, (path,) if beside is None else (path, beside)))
    return jobs


def _radiographs(folder: Path, output: Path) -> list[Path]:
    candidates = (
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not path.absolute().is_relative_to(output)
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
