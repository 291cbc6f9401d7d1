"""Verification: every damage is found, good files are remembered, changed ones are read again (T24–T31, T44)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dataset import verification
from dataset.store import write_store
from dataset.verification import BadFile, find_volumes, verify_files
from dataset.volume_io import Volume, write_nifti
from errors import ConfigurationError, InputError
from tests.dataset.test_nifti_header import bad_files

AFFINE = np.array([[0, 0, -0.7, 9], [0, -0.7, 0, 12], [2.5, 0, 0, -30], [0, 0, 0, 1.0]])


def volume(seed: int = 0, shape: tuple[int, int, int] = (8, 12, 10)) -> Volume:
    return Volume(np.random.default_rng(seed).integers(-1024, 1500, shape).astype(np.int16), AFFINE)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data" / "deep").mkdir(parents=True)
    write_nifti(tmp_path / "data" / "a.nii.gz", volume())
    write_nifti(tmp_path / "data" / "deep" / "b.nii", volume())
    write_store(tmp_path / "data" / "deep" / "c.b2nd", volume(), {"grid": "native"})
    return tmp_path / "data"


def counted(monkeypatch) -> list[str]:
    """Names of the files that are read from now on."""
    seen: list[str] = []
    whole = verification.verify_file
    monkeypatch.setattr(verification, "verify_file", lambda path: (seen.append(path.name), whole(path))[1])
    return seen


def damage(path: Path) -> None:
    """Flip a bit in the middle; size stays."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


# ---------------------------------------------------------------- finding


def test_find_volumes(folder):
    (folder / "._a.nii.gz").touch()  # what macOS leaves beside files
    (folder / "report.json").touch()
    assert [path.name for path in find_volumes(folder)] == ["a.nii.gz", "b.nii", "c.b2nd"]
    assert find_volumes(folder / "a.nii.gz") == [folder / "a.nii.gz"]
    with pytest.raises(ConfigurationError, match="no such folder"):
        find_volumes(folder / "nowhere")
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no .nii or"):
        find_volumes(folder / "empty")


# ---------------------------------------------------------------- bad files


@pytest.mark.parametrize("threads", [1, 3])
def test_t24_to_t27_every_bad_nifti_is_named_and_no_good_one(tmp_path, threads):
    bad = bad_files(tmp_path)
    for index in range(3):
        write_nifti(tmp_path / f"good_{index}.nii.gz", volume(index))
    began = time.process_time()
    found = verify_files([*bad, *tmp_path.glob("good*")], None, threads=threads)
    assert [entry.path for entry in found] == [str(path) for path in bad]
    assert time.process_time() - began < 0.2 * len(bad)
    for entry in found:
        assert entry.kind == "NIfTI"
        assert entry.reason.startswith(f"{entry.path}: ")
        assert "\n" not in entry.reason


@pytest.mark.parametrize("name", ["a.nii.gz", "deep/c.b2nd"])
def test_a_flipped_bit_is_found(folder, name):
    damage(folder / name)
    (bad,) = verify_files(find_volumes(folder), None)
    assert bad == BadFile(str(folder / name), "store" if name.endswith("b2nd") else "NIfTI", bad.reason)
    assert bad.reason.startswith(str(folder / name))


# ---------------------------------------------------------------- memory


def test_good_files_are_read_once(folder, tmp_path, monkeypatch):
    cache = tmp_path / "sub" / "cache.json"
    seen = counted(monkeypatch)
    paths = find_volumes(folder)
    assert verify_files(paths, cache) == []
    assert seen == ["a.nii.gz", "b.nii", "c.b2nd"]
    assert verify_files(paths, cache) == []
    monkeypatch.chdir(folder)
    assert verify_files([Path("a.nii.gz")], cache) == []  # the same file by another path
    assert len(seen) == 3
    assert verify_files(paths, None) == []
    assert len(seen) == 6


@pytest.mark.parametrize("kept", ["nothing", "time"])
def test_a_changed_file_is_read_again(folder, tmp_path, monkeypatch, kept):
    cache = tmp_path / "cache.json"
    paths = find_volumes(folder)
    verify_files(paths, cache)
    status = paths[0].stat()
    damage(paths[0])
    if kept == "time":  # as a copy does that keeps times
        os.utime(paths[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    seen = counted(monkeypatch)
    assert [Path(entry.path).name for entry in verify_files(paths, cache)] == ["a.nii.gz"]
    assert seen == ["a.nii.gz"]
    assert len(verify_files(paths, cache)) == 1  # bad ones are never remembered as good
    write_nifti(paths[0], volume(3))
    assert verify_files(paths, cache) == []
    assert verify_files([*paths, folder / "gone.nii"], cache)[0].path.endswith("gone.nii")


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b'{"version": 1}', b'{"version": 99, "good": {}}', b"\xff\0"])
def test_a_damaged_cache_costs_only_time(folder, tmp_path, monkeypatch, text):
    cache = tmp_path / "cache.json"
    cache.write_bytes(text)
    seen = counted(monkeypatch)
    assert verify_files(find_volumes(folder), cache) == []
    assert len(seen) == 3
    assert len(json.loads(cache.read_text())["good"]) == 3


def test_a_sound_file_without_air_is_told_apart_and_read_once(tmp_path, monkeypatch):
    tissue = Volume(np.full((4, 5, 6), 40, np.int16), AFFINE)
    write_nifti(tmp_path / "a.nii", tissue)
    write_store(tmp_path / "b.b2nd", tissue, {})
    paths, seen = find_volumes(tmp_path), counted(monkeypatch)
    for _ in range(2):
        for path, found in zip(paths, verify_files(paths, tmp_path / "cache.json"), strict=True):
            assert found.without_air
            assert found.reason.startswith(f"{path}: no voxel is below -300 HU")
    assert seen == ["a.nii", "b.b2nd"]
    write_nifti(paths[0], volume())
    assert [found.path for found in verify_files(paths, tmp_path / "cache.json")] == [str(paths[1])]


def test_a_cache_that_cannot_be_written_costs_only_a_warning(folder, tmp_path, caplog):
    (tmp_path / "file").touch()
    assert verify_files(find_volumes(folder), tmp_path / "file" / "cache.json") == []
    assert "cannot be remembered" in caplog.text


def test_a_file_replaced_while_it_is_read_is_not_remembered(folder, tmp_path, monkeypatch):
    whole = verification.verify_file

    def slow(path: Path) -> BadFile | None:
        found = whole(path)
        if path.name == "a.nii.gz":
            write_nifti(path, volume(9))
        return found

    monkeypatch.setattr(verification, "verify_file", slow)
    verify_files(find_volumes(folder), tmp_path / "cache.json")
    good = json.loads((tmp_path / "cache.json").read_text())["good"]
    assert sorted(Path(name).name for name in good) == ["b.nii", "c.b2nd"]


# ---------------------------------------------------------------- T44

FUZZ = """
import json, random, sys, time
from vq_gan_3d.memory import peak_rss_bytes
from pathlib import Path
import numpy as np
from dataset.store import open_store
from dataset.verification import kind_of, verify_file
from dataset.volume_io import read_nifti
source, count = Path(sys.argv[1]), int(sys.argv[2])
peak = lambda: peak_rss_bytes() / 2**20
def content(path):
    volume = open_store(path) if kind_of(path) == "store" else read_nifti(path)
    return np.asarray(volume.hu[...]), volume.affine, getattr(volume, "metadata", None)
def mutated(rng):
    data = bytearray(good)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        # headers and trailers are where lies live
        region = rng.choice(((0, min(400, len(data))), (max(0, len(data) - 700), len(data)), (0, len(data))))
        at = rng.randrange(*region) if region[0] < region[1] else 0
        way = rng.randrange(6)
        if way == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif way == 1:
            data[at] = rng.randrange(256)
        elif way == 2:
            data[at : at + 4] = rng.choice((b"\\xff" * 4, b"\\xff\\xff\\xff\\x7f", b"\\x7f\\xff\\xff\\xff", bytes(4)))
        elif way == 3:
            del data[at : at + rng.randrange(1, 64)]
        elif way == 4:
            data[at:at] = rng.randbytes(rng.randrange(1, 64))
        else:
            del data[at:]
        data = data or bytearray(b"x")
    return bytes(data)
good = source.read_bytes()
reference = content(source)
target = source.with_name("mutated" + "".join(source.suffixes))
wrong, slowest, accepted = [], 0.0, 0
before = peak()
for seed in range(count):
    target.write_bytes(mutated(random.Random(seed)))
    began = time.process_time()
    try:
        bad = verify_file(target)
    except BaseException as error:
        wrong.append(f"{seed}: {error!r}")
        continue
    finally:
        slowest = max(slowest, time.process_time() - began)
    if bad is None and kind_of(target) == "store":
        accepted += 1
        hu, affine, metadata = content(target)
        if not (np.array_equal(hu, reference[0]) and np.array_equal(affine, reference[1]) and metadata == reference[2]):
            wrong.append(f"{seed}: accepted with other content")
print(json.dumps({"wrong": wrong, "slowest": slowest, "grown": peak() - before, "accepted": accepted}))
"""


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.b2nd"])
@pytest.mark.parametrize("count", [300, pytest.param(6000, marks=pytest.mark.slow)])
def test_t44_mutated_files_give_only_input_errors(tmp_path, name, count):
    """And a store that is accepted holds what was written: voxels, affine and metadata."""
    if name.endswith("b2nd"):
        write_store(tmp_path / name, volume(), {"grid": "native", "body": {"share_body": 0.5}})
    else:
        write_nifti(tmp_path / name, volume())
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, str(tmp_path / name), str(count)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"
    result = json.loads(done.stdout)
    assert result["wrong"] == []
    assert result["slowest"] < 2
    assert result["grown"] < 500
