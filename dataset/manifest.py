"""What a cohort is: a short hash that a resumed run must find again."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from dataset.prepared import short_hash
from dataset.sources import VolumeSource
from dataset.store import open_store
from errors import InputError

_GZIP_TRAILER_BYTES = 8  # checksum and length of the content


def manifest(splits: Mapping[str, Sequence[VolumeSource]]) -> str:
    """A short hash of who is in which split and what each volume holds; a resumed run must see the same.

    It survives a cohort that was moved. Of uncompressed NIfTI it knows the size alone.
    """
    lines = [f"{source.name} {split} {_content(source)}" for split, sources in splits.items() for source in sources]
    return short_hash("\n".join(sorted(lines)))


def _content(source: VolumeSource) -> str:
    """What tells a volume from another of its name, without reading it and whatever its folder and times."""
    store: Path | None = getattr(source, "store", None)
    path: Path | None = getattr(source, "ct", getattr(source, "path", None))
    try:
        if store is not None:
            return open_store(store).checksum
        if path is None:
            return source.identity  # made, not read: its recipe
        with path.open("rb") as handle:
            size = handle.seek(0, os.SEEK_END)
            handle.seek(max(0, size - _GZIP_TRAILER_BYTES))
            return f"{size} {handle.read().hex() if path.suffix == '.gz' else ''}"
    except (InputError, OSError):  # told when it is prepared
        return "unreadable"
