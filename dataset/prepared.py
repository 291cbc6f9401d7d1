"""A volume that is ready for training: a store, and where the body is in it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataset.atomic import atomic_write, make_folder
from dataset.body import body_metadata
from dataset.patch_sampling import BodyMap, read_body
from dataset.store import LazyHU, StoredVolume, open_store
from errors import InputError

LOCKS = "preparing.lock"  # of all volumes in a cache


@dataclass(frozen=True)
class PreparedVolume:
    """A volume in a store, standard axes, int16 HU, ready to be cropped without reading the rest.

    Attributes:
        name: of its source.
        path: the ``.b2nd`` file.
        affine: (4, 4) index (d, h, w, 1) -> RAS+ mm.
        body: where the body is, if that is known.
        cached: made by `prepare`, which makes it again when it is damaged; else a user's own store.
    """

    name: str
    path: Path
    affine: np.ndarray
    body: BodyMap | None = None
    cached: bool = True

    def open(self) -> LazyHU:
        """The voxels, (D, H, W) int16, read when sliced; the frame is checked each time, which takes a millisecond.

        Raises:
            InputError: the file is damaged or gone.
        """
        try:
            return open_store(self.path).hu
        except InputError as error:
            if not self.cached:
                raise
            raise InputError(
                f"{self.path}: cached volume of {self.name} is damaged, the next run makes it again ({error})"
            ) from error


def body_of(stored: StoredVolume) -> BodyMap | None:
    """The body that the metadata of a store describe, None where they do not.

    Raises:
        InputError: they do not fit the volume.
    """
    try:
        return read_body(stored.metadata, stored.shape)
    except InputError as error:
        raise InputError(f"{stored.path}: {error}") from error


def own_body(name: str, stored: StoredVolume, cache: Path) -> BodyMap | None:
    """The body in a user's store; where its writer left it out, found once and kept in the cache by checksum."""
    if "body" in stored.metadata:
        return body_of(stored)
    path = cache / f"{name}-{short_hash(stored.checksum)}.body.json"
    try:
        return read_body({"body": json.loads(path.read_text())}, stored.shape)
    except (OSError, ValueError, InputError):
        body = body_metadata(stored.hu, stored.affine)
    make_cache(cache)
    with atomic_write(path) as handle:
        handle.write(json.dumps(body).encode())
    return read_body({"body": body}, stored.shape)


def make_cache(cache: Path) -> None:
    """Create the cache folder.

    Raises:
        StorageError: it cannot be created.
    """
    make_folder(cache, "set dataset.cache_dir")


@contextlib.contextmanager
def one_maker(path: Path) -> Iterator[None]:
    """Hold the right to make a cached file; who else wants to make it waits, and finds it made.

    Every process of a distributed run prepares the cohort. One file in the cache carries the locks, each volume has a
    byte of it, and the system gives a lock back when its holder dies. Where the file system knows no locks, two may
    make the same file: both write it whole, so that costs time alone.

    Raises:
        StorageError: the cache cannot be created.
    """
    make_cache(path.parent)
    byte = int(short_hash(path.name), 16) >> 1  # offsets of files have a sign
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            handle = stack.enter_context((path.parent / LOCKS).open("wb"))
            fcntl.lockf(handle, fcntl.LOCK_EX, 1, byte)
        yield


def short_hash(text: str) -> str:
    """Sixteen hex digits of SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
