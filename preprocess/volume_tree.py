"""Volumes below a folder by the name that everything made of them gets, so that outputs keep the tree of the input."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dataset.pairs_case import volume_stem
from dataset.verification import VOLUME_SUFFIXES, find_volumes
from errors import InputError


def named_volumes(root: Path, suffixes: Sequence[str] = VOLUME_SUFFIXES) -> dict[str, Path]:
    """``site/a.nii.gz`` as ``site/a``; a single file is taken as it is.

    Raises:
        ConfigurationError: no such folder.
        InputError: no volume in it, or two of one name.
    """
    named: dict[str, Path] = {}
    for path in find_volumes(root, suffixes):
        name = ((path.relative_to(root).parent if root.is_dir() else Path()) / volume_stem(path)).as_posix()
        if name in named:
            raise InputError(f"{path}: another volume of this folder has the same stem: rename one of them")
        named[name] = path
    return named
