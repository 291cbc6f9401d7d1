"""Records of an evaluation that goes on where it stopped: a folder of JSON files, one for each case."""

from __future__ import annotations

import io
import json
import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dataset.atomic import atomic_write, make_folder
from errors import ConfigurationError


def claim(output: Path, settings: dict[str, Any]) -> None:
    """Make a folder of results ours; results of other settings must not be mixed with ours.

    Args:
        output: the folder; ``settings.json`` and ``cases/`` are made in it.
        settings: everything that decides the results, JSON-able.

    Raises:
        ConfigurationError: the folder holds results of other settings.
        StorageError: it cannot be made.
    """
    record = output / "settings.json"
    make_folder(output / "cases", "give another --output")
    if (known := read_record(record)) is None:
        write_record(record, settings)
    elif known != settings:
        differing = ", ".join(key for key in settings | known if known.get(key) != settings.get(key))
        raise ConfigurationError(f"{output}: holds results of another {differing}: give another --output, or remove it")


def read_record(path: Path) -> dict[str, Any] | None:
    """A finished record; one that is damaged counts as missing, and is made again."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return _numbers(record) if isinstance(record, dict) else None


def write_record(path: Path, content: dict[str, Any]) -> None:
    """Write a record whole or not at all; JSON knows neither NaN nor infinity, which become null.

    Raises:
        StorageError: the disk refuses.
    """
    with atomic_write(path) as handle:
        handle.write(json.dumps(_plain(content), indent=1, allow_nan=False).encode())


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """Arrays of `write_arrays`; a damaged file counts as missing."""
    try:
        with np.load(path, allow_pickle=False) as content:
            return {name: content[name] for name in content.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
        return None


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as ``.npz``, whole or not at all.

    Raises:
        StorageError: the disk refuses.
    """
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]
    with atomic_write(path) as handle:
        handle.write(content.getvalue())


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_numbers(entry) for entry in value]
    return math.nan if value is None else value
