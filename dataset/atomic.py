"""Atomic file replacement: a reader sees the whole old file or the whole new file, whatever happens in between.

Used for every artefact that must never be lost: volumes, checkpoints, manifests. The temporary file lies in the
target's own folder, because a rename across file systems is a copy, and a kill during that copy destroys the target.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import platform
import re
import secrets
import stat
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from errors import StorageError, one_line

BUFFER_BYTES = 1 << 20
# A writer touches its temporary file all the time: one that nobody touched for so long has lost its owner.
STALE_AFTER_S = 3600.0
_TEMPORARY_NAME = re.compile(r"^\..*\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.tmp$")

_WHAT_TO_DO = {
    errno.ENOSPC: "the disk is full: free space there or choose another folder",
    errno.EDQUOT: "your disk quota is used up: free space there or choose another folder",
    errno.EFBIG: "the file is larger than this system allows: raise `ulimit -f` or choose another file system",
    errno.EACCES: "no permission to write there: choose a folder that you own",
    errno.EPERM: "no permission to write there: choose a folder that you own",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.ENOENT: "the folder does not exist: create it first",
    errno.ENOTDIR: "a part of the path is a file, not a folder: choose another folder",
    errno.EISDIR: "a folder has this name: choose another file name",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
    errno.EIO: "the disk reports a hardware error: choose another disk",
}
# Errors by which a file system says that it does not know fsync on a folder; the rename itself stands.
_NO_FOLDER_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM, errno.ENOSYS}


class _RecordingFile(io.FileIO):
    """A file that remembers its first failed write.

    Serialisers may turn a full disk into a RuntimeError of their own (torch.save does) or swallow it; what the
    operating system said must not get lost.
    """

    failure: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise

    def truncate(self, size: int | None = None, /) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.failure = self.failure or error
            raise


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yield a binary handle whose content becomes ``path`` when, and only when, the block ends without an exception.

    The bytes are flushed and fsynced before the rename and the folder after it, so the new file survives a power cut.
    On any exception, KeyboardInterrupt included, the temporary file is removed and the target stays as it was. A kill
    leaves the target as it was and a hidden ``.tmp``, which the next write into that folder removes. An existing
    target keeps its permission bits; a target that is a symbolic link is replaced, what it points to is not touched.

    Args:
        path: the file to create or replace; its folder must exist.

    Raises:
        StorageError: the folder or the disk refuses. Errors of the block that are not the file's pass unchanged.
    """
    target = Path(path)
    try:
        temporary, raw = _open_temporary(target)
    except OSError as error:
        _refuse(target, error)
    handle = io.BufferedWriter(raw, BUFFER_BYTES)
    try:
        yield handle
        if raw.failure is not None:
            raise raw.failure
        try:
            handle.flush()
            os.fsync(raw.fileno())
            handle.close()
            os.replace(temporary, target)
        except OSError as error:
            _refuse(target, error)
    except BaseException as error:
        failure = raw.failure  # before the clean-up, which may fail in its own right
        _discard(handle, raw, temporary)
        if failure is not None and isinstance(error, Exception) and not isinstance(error, StorageError):
            _refuse(target, failure, error)
        raise
    try:
        _sync_folder(target.parent)
    except OSError as error:
        _refuse(target, error)


def make_folder(folder: Path, what_to_do: str = "choose another --output") -> None:
    """Create a folder and those above it; one that is there is fine.

    Raises:
        StorageError: it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be created ({error.strerror}): {what_to_do}") from error


def _open_temporary(target: Path) -> tuple[Path, _RecordingFile]:
    """Create the temporary file beside ``target``; everything that can be refused is refused here, before the work."""
    mode = None
    with contextlib.suppress(FileNotFoundError):
        status = target.stat()
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
        mode = stat.S_IMODE(status.st_mode)
    if target.name in ("", ".", ".."):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    _remove_abandoned(target.parent)
    # the file name is cut so that the addition never exceeds the 255 bytes of a name; bytes, not characters
    stem = os.fsdecode(os.fsencode(target.name)[:160])
    temporary = target.parent / f".{stem}.{_owner()}-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    # os.open with 0o666 honours the umask, mkstemp would leave every result readable by its owner alone
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
    if mode is not None:
        with contextlib.suppress(OSError):
            os.fchmod(descriptor, mode)
    return temporary, _RecordingFile(descriptor, "wb")


def _owner() -> str:
    """Eight hex digits for this host and process namespace: a process number means something only within them."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{zlib.crc32(f'{platform.node()} {namespace}'.encode()):08x}"


def _remove_abandoned(folder: Path) -> None:
    """Remove temporary files whose writer was killed, so that a run killed often does not fill the disk."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            match = _TEMPORARY_NAME.match(name)
            if match is None:
                continue
            with contextlib.suppress(OSError):
                dead = match[1] == _owner() and not _is_alive(int(match[2]))
                if dead or time.time() - os.stat(folder / name).st_mtime > STALE_AFTER_S:
                    os.unlink(folder / name)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _discard(handle: io.BufferedWriter[_RecordingFile], raw: _RecordingFile, temporary: Path) -> None:
    # the descriptor first: closing the buffer would flush it, onto a disk that may be full
    with contextlib.suppress(OSError):
        raw.close()
    with contextlib.suppress(OSError, ValueError):
        handle.close()
    with contextlib.suppress(OSError):
        temporary.unlink()


def _sync_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_FSYNC:
            raise


def _refuse(target: Path, error: OSError, cause: BaseException | None = None) -> NoReturn:
    reason = _WHAT_TO_DO.get(error.errno or 0)
    if reason is None:
        reason = f"{error.strerror or error}: check the disk and the path"
    raise StorageError(one_line(f"{target}: not written, {reason}")) from (cause or error)
