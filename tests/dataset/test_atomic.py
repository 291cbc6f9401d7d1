"""Atomic replacement: whatever happens, the target is the old file or the new one (T31, and the base of T01–T05)."""

import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from dataset.atomic import STALE_AFTER_S, atomic_write
from errors import StorageError


def temporaries(folder):
    return [name for name in os.listdir(folder) if name.endswith(".tmp")]


def run_python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "state.ckpt"
    path.write_bytes(b"old")
    return path


def test_replaces_and_creates(target):
    with atomic_write(target) as handle:
        handle.write(b"new")
        assert target.read_bytes() == b"old"  # nothing shows before the end
    assert target.read_bytes() == b"new"
    with atomic_write(str(target.with_name("other"))) as handle:
        handle.write(b"1" * 5_000_000)
    assert target.with_name("other").stat().st_size == 5_000_000
    assert temporaries(target.parent) == []


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3), OSError("another file")])
def test_an_exception_leaves_the_old_file_and_passes_unchanged(target, error):
    def write_half():
        with atomic_write(target) as handle:
            handle.write(b"half")
            raise error

    with pytest.raises(type(error)) as caught:
        write_half()
    assert caught.value is error
    assert target.read_bytes() == b"old"
    assert os.listdir(target.parent) == [target.name]


def test_permissions(target):
    target.chmod(0o640)
    with atomic_write(target) as handle:
        handle.write(b"new")
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    umask = os.umask(0o027)
    try:
        with atomic_write(target.with_name("fresh")) as handle:
            handle.write(b"new")
    finally:
        os.umask(umask)
    assert stat.S_IMODE(target.with_name("fresh").stat().st_mode) == 0o640


def test_a_symbolic_link_is_replaced_and_what_it_names_stays(target):
    link = target.with_name("last.ckpt")
    link.symlink_to(target)
    with atomic_write(link) as handle:
        handle.write(b"new")
    assert not link.is_symlink()
    assert (link.read_bytes(), target.read_bytes()) == (b"new", b"old")


def test_the_handle_can_seek(target):
    with atomic_write(target) as handle:
        handle.write(b"....rest")
        handle.seek(0)
        handle.write(b"head")
    assert target.read_bytes() == b"headrest"


def test_a_long_name(tmp_path):
    path = tmp_path / ("ü" * 120)
    with atomic_write(path) as handle:
        handle.write(b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize(
    ("place", "reason"),
    [("missing/x.ckpt", "does not exist"), ("state.ckpt/x.ckpt", "is a file"), ("", "a folder"), ("n" * 300, "long")],
)
def test_t05_what_cannot_be_written_is_refused_before_the_work(target, place, reason):
    path = target.parent / place
    with pytest.raises(StorageError, match=reason) as caught, atomic_write(path):
        pytest.fail("the block must not run")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert os.listdir(target.parent) == [target.name]


def test_a_read_only_file_system():
    if not os.path.isdir("/proc/self"):
        pytest.skip("no /proc on this system")
    with pytest.raises(StorageError, match=r"/proc/self/x: not written"), atomic_write("/proc/self/x"):
        pass


KILLED = """
import os, signal, sys
from dataset.atomic import atomic_write
with atomic_write(sys.argv[1]) as handle:
    handle.write(b"half" * 1000000)
    handle.flush()
    os._exit(9) if sys.argv[2] == "exit" else os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("way", ["exit", "kill"])
def test_t01_a_kill_leaves_the_old_file_and_the_next_write_cleans_up(target, way):
    done = run_python(KILLED, target, way)
    assert done.returncode == (9 if way == "exit" else -signal.SIGKILL), done.stderr
    assert target.read_bytes() == b"old"
    assert len(temporaries(target.parent)) == 1
    with atomic_write(target) as handle:
        handle.write(b"new")
    assert os.listdir(target.parent) == [target.name]


def test_only_abandoned_temporaries_are_removed(target):
    with atomic_write(target) as outer:
        outer.write(b"outer")
        with atomic_write(target) as inner:  # a writer that lives keeps its file
            inner.write(b"inner")
        assert target.read_bytes() == b"inner"
    assert target.read_bytes() == b"outer"

    foreign = target.with_name(".state.ckpt.00000000-1-00000000.tmp")  # of another host: only its age tells
    foreign.write_bytes(b"x")
    unrelated = target.with_name(".mine.tmp")
    unrelated.write_bytes(b"x")
    with atomic_write(target) as handle:
        handle.write(b"new")
    assert foreign.exists()
    long_ago = time.time() - STALE_AFTER_S - 10
    os.utime(foreign, (long_ago, long_ago))
    os.utime(unrelated, (long_ago, long_ago))
    with atomic_write(target) as handle:
        handle.write(b"new")
    assert not foreign.exists()
    assert unrelated.exists()


# A file-size limit fails writes half-way, as a full disk does. The ways to fail: in a write of the block, in the final
# flush, in a serialiser that hides the reason (torch.save), in one that swallows it.
FULL = """
import resource, sys
from dataset.atomic import atomic_write
from errors import StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

def hide(handle):
    try:
        handle.write(b"x" * 3_000_000)
    except OSError:
        raise RuntimeError("write failed") from None

def swallow(handle):
    try:
        handle.write(b"x" * 3_000_000)
    except OSError:
        handle.seek(0)

def save(handle):
    import torch
    torch.save({"weights": torch.zeros(1_000_000)}, handle)

for fill in (lambda h: h.write(b"x" * 3_000_000), lambda h: h.write(b"x" * 500_000), hide, swallow, save):
    try:
        with atomic_write(sys.argv[1]) as handle:
            fill(handle)
        print("written")
    except StorageError as error:
        print(error)
"""


def test_t03_a_full_disk_keeps_the_old_file(target):
    done = run_python(FULL, target)
    lines = done.stdout.splitlines()
    assert len(lines) == 5, done.stderr
    assert all(line.startswith(f"{target}: not written, the file is larger") for line in lines), lines
    assert target.read_bytes() == b"old"
    assert os.listdir(target.parent) == [target.name]


def test_a_device_that_is_full(target, monkeypatch):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    real_open = os.open

    def open_full(path, flags, mode=0o777):
        return real_open("/dev/full" if flags & os.O_CREAT else path, flags & ~(os.O_CREAT | os.O_EXCL), mode)

    monkeypatch.setattr(os, "open", open_full)
    with pytest.raises(StorageError, match="disk is full"), atomic_write(target) as handle:
        handle.write(b"new")
    assert target.read_bytes() == b"old"


def test_a_failing_fsync_keeps_the_old_file(target, monkeypatch):
    def fail(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match="hardware"), atomic_write(target) as handle:
        handle.write(b"new")
    assert target.read_bytes() == b"old"
    assert temporaries(target.parent) == []
