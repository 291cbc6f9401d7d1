"""Checkpoints that are never lost: atomic, verified, free of pickled code.

A checkpoint is what ``torch.save`` writes, followed by a trailer with the SHA-256 of all that stands before it. The
zip reader of ``torch.load`` skips the trailer, so the file opens anywhere; ours checks it first, since neither
``torch.load`` nor safetensors notices a flipped bit.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from dataset.atomic import atomic_write
from errors import InputError, StorageError

MAGIC = b"XR2CTPA\x01"
TRAILER_BYTES = len(MAGIC) + hashlib.sha256().digest_size
_CHUNK_BYTES = 1 << 22


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write ``content`` (plain containers and tensors) atomically, with its checksum.

    Raises:
        StorageError: the disk refuses; an existing checkpoint of that name is untouched.
    """
    with atomic_write(path) as handle:
        hashing = _HashingWriter(handle)
        torch.save(content, cast(BinaryIO, hashing))  # it needs write and flush alone
        handle.write(MAGIC + hashing.digest())


class _HashingWriter:
    """A write-only stream that hashes what passes; torch.save writes zip records strictly in order."""

    def __init__(self, handle: BinaryIO) -> None:
        self._handle = handle
        self._hash = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        return self._handle.write(data)

    def flush(self) -> None:
        self._handle.flush()

    def digest(self) -> bytes:
        return self._hash.digest()


def verify_checkpoint(path: str | Path) -> str:
    """Check length and checksum of a checkpoint; returns the SHA-256 (hex) that names its content.

    Raises:
        InputError: missing, truncated, damaged, or not a checkpoint of this project.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            digest, remaining = hashlib.sha256(), size - TRAILER_BYTES
            if remaining <= 0:
                raise InputError(f"{path}: no checkpoint, only {size} bytes")
            while remaining:
                chunk = handle.read(min(_CHUNK_BYTES, remaining))
                if not chunk:
                    raise InputError(f"{path}: changed while it was read")
                digest.update(chunk)
                remaining -= len(chunk)
            trailer = handle.read(TRAILER_BYTES)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    if trailer[: len(MAGIC)] != MAGIC:
        raise InputError(f"{path}: truncated, or no checkpoint of this project (its checksum is missing)")
    if trailer[len(MAGIC) :] != digest.digest():
        raise InputError(f"{path}: damaged (its checksum does not match)")
    return digest.hexdigest()


def load_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Verify and load a checkpoint; nothing in it is ever executed.

    Raises:
        InputError: missing, truncated, damaged, or holding anything but plain containers and tensors.
    """
    verify_checkpoint(path)
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path}: refused, it holds code or objects beside tensors") from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a checkpoint ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    return content


def copy_checkpoint(source: str | Path, target: str | Path) -> None:
    """Copy a checkpoint atomically. A copy and no link: damage to one file must not reach the other."""
    with open(source, "rb") as reader, atomic_write(target) as writer:
        shutil.copyfileobj(reader, writer, _CHUNK_BYTES)


def all_checkpoints(folder: str | Path) -> list[Path]:
    """Checkpoints of a run that training can go on from, by name."""
    return sorted(path for path in Path(folder).glob("*.ckpt") if path.is_file())


def stored_steps(path: Path) -> float:
    """Batches that a checkpoint was trained on, read without its tensors; of a damaged one its name's, else infinity.

    An infinite one is looked at first, and so is named among the rejected.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return int(content.get("current_model_state", content["state_dict"])["steps"])
    except Exception:  # whatever torch makes of a damaged file; `verify_checkpoint` has the last word on it
        named = re.search(r"_step_(\d+)\.ckpt$", path.name)
        return int(named[1]) if named else float("inf")


def newest_first(folder: str | Path) -> list[Path]:
    """Checkpoints of a run, newest first: by their steps, since a copy may have lost the times; then by time."""

    def age(path: Path) -> tuple[float, float, bool]:
        return stored_steps(path), path.stat().st_mtime, path.name == "last.ckpt"

    return sorted(all_checkpoints(folder), key=age, reverse=True)


def find_resumable(folder: str | Path) -> tuple[Path, list[str]]:
    """The newest valid checkpoint of a folder, and one line for each newer one that had to be rejected.

    Raises:
        InputError: there is none, or all are damaged: training never restarts at step 0 in silence.
    """
    rejected: list[str] = []
    for path in newest_first(folder):
        try:
            verify_checkpoint(path)
        except InputError as error:
            rejected.append(str(error))
        else:
            return path, rejected
    if rejected:
        raise InputError(f"{folder}: all {len(rejected)} checkpoints are damaged: {'; '.join(rejected)}")
    raise InputError(f"{folder}: no checkpoint to resume from: start without ckpt_path")


def _iterate_names(content: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if name.startswith(prefix):
            yield name[len(prefix) :], value


def codec_weights(checkpoint: dict[str, Any], *, ema: bool = True) -> dict[str, torch.Tensor]:
    """State dict of the codec inside a training checkpoint, averaged (default) or raw weights."""
    raw = checkpoint.get("current_model_state", checkpoint["state_dict"])
    return dict(_iterate_names(checkpoint["state_dict"] if ema else raw, "codec."))


def is_writable(folder: Path) -> None:
    """Create ``folder`` and prove before step 0 that checkpoints can be written there.

    Raises:
        StorageError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be created ({error.strerror}): choose another output_dir") from error
    probe = folder / f".probe_{uuid.uuid4().hex}"  # processes that share the folder do not remove each other's
    with atomic_write(probe) as handle:
        handle.write(b"\0")
    os.unlink(probe)
