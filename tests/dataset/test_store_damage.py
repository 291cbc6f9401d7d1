"""Damaged and hostile stores end in one line, soon, and without memory that grows."""

from __future__ import annotations

import os
import random
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path

import blosc2
import msgpack
import numpy as np
import pytest

from benchmarks.memory import PeakMemory
from dataset.store import open_store, verify_store, write_store
from dataset.store_frame import read_frame
from dataset.volume_io import Volume
from errors import InputError
from tests.dataset.store_factory import AFFINE, METADATA, noise, store

__all__ = ["store"]


def refused(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        verify_store(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_t24_truncated_at_every_sixteenth(store: Path, tmp_path: Path) -> None:
    content = store.read_bytes()
    for part in range(16):
        refused(tmp_path / "cut.b2nd", content[: len(content) * part // 16])
    refused(tmp_path / "cut.b2nd", content[:-1])
    refused(tmp_path / "longer.b2nd", content + b"x")


@pytest.mark.parametrize("name", ["nothing", "folder", "pipe", "noise", "foreign", "schunk", "floats"])
def test_t24_what_is_no_store(store: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.b2nd"
    if name == "folder":
        path.mkdir()
    elif name == "pipe":
        os.mkfifo(path)  # opening it would wait forever
    elif name == "noise":
        path.write_bytes(random.Random(0).randbytes(5000))
    elif name == "foreign":
        blosc2.asarray(noise((4, 4, 4)), urlpath=str(path))
    elif name == "schunk":
        blosc2.SChunk(data=b"x" * 1000, urlpath=str(path), contiguous=True)
    elif name == "floats":
        array = blosc2.asarray(np.zeros((4, 4, 4)), urlpath=str(path))
        array.schunk.vlmeta["xray2ctpa"] = "{}"
    with pytest.raises(InputError, match=str(path)):
        open_store(path)


def with_layer(store: Path, change: dict[str, object]) -> bytes:
    """The store's frame with other numbers in its description of the array, of the same length."""
    content = bytearray(store.read_bytes())
    header = content[: struct.unpack(">i", content[11:15])[0]]
    at = header.index(b"b2nd") + 4
    begin = bytes(content).index(b"\x97\x00\x03\x93", at)
    for name, value in change.items():
        offset = {"shape": begin + 4, "chunks": begin + 32, "blocks": begin + 48}[name]
        step, form = (9, ">q") if name == "shape" else (5, ">i")
        for axis, length in enumerate(value):  # type: ignore[var-annotated, arg-type]
            struct.pack_into(form, content, offset + axis * step + 1, length)
    return bytes(content)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": (2**40, 2**40, 2**40)}, "lengths"),
        ({"shape": (20000, 20000, 20000)}, "more than"),
        ({"shape": (0, 50, 70)}, "lengths"),
        ({"shape": (-1, 50, 70)}, "lengths"),
        ({"shape": (41, 50, 70)}, ""),
        ({"chunks": (2**30, 2**30, 2**30), "blocks": (1, 1, 1)}, "chunks"),
        ({"blocks": (0, 32, 64)}, "lengths"),
    ],
)
def test_t24_hostile_headers_are_refused_before_memory_is_taken(
    store: Path, tmp_path: Path, change: dict[str, object], words: str
) -> None:
    content = with_layer(store, change)
    start = time.process_time()
    with PeakMemory() as memory:
        assert words in refused(tmp_path / "x.b2nd", content)
    assert time.process_time() - start < 1
    assert memory.bytes < 100e6


def test_t24_a_bomb_in_the_record(tmp_path: Path) -> None:
    path = tmp_path / "x.b2nd"
    array = blosc2.asarray(noise((4, 4, 4)), urlpath=str(path), dparams=blosc2.DParams(nthreads=1))
    array.schunk.vlmeta["xray2ctpa"] = "x" * (200 << 20)  # some kB compressed
    del array
    assert path.stat().st_size < 1 << 20
    with pytest.raises(InputError):
        open_store(path)


def test_t38_metalayers_that_blosc2_would_act_on_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.b2nd"
    for layer in ("LazyArray", "proxy-source", "b2o"):
        meta = {layer: {"expression": "__import__('os').system('touch canary')"}}
        array = blosc2.asarray(noise((4, 4, 4)), urlpath=str(path), mode="w", meta=meta)
        array.schunk.vlmeta["xray2ctpa"] = "{}"
        del array
        with pytest.raises(InputError, match="more than one array"):
            open_store(path)
    assert not (Path.cwd() / "canary").exists()


def test_a_flipped_voxel_is_found_by_the_checksum(store: Path, tmp_path: Path) -> None:
    content = store.read_bytes()
    other = tmp_path / "other.b2nd"
    hu = noise()
    hu[7, 8, 9] += 1
    write_store(other, Volume(hu, AFFINE), METADATA)
    assert verify_store(other).checksum != open_store(store).checksum
    # noise is stored as it is, so that a flipped bit in the middle decodes without complaint
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 4
    refused(other, bytes(flipped))


@pytest.mark.parametrize("change", [{"marker": "?"}, {"version": 99}, {"shape": [1, 2, 3]}, {"affine": [[1]]}, None])
def test_a_record_that_does_not_fit(tmp_path: Path, change: dict[str, object] | None) -> None:
    import json

    path = tmp_path / "x.b2nd"
    write_store(path, Volume(noise((4, 4, 4)), AFFINE), {})
    record = read_frame(path).record
    array = blosc2.open(str(path), mode="a")
    array.schunk.vlmeta["xray2ctpa"] = json.dumps(record | change) if change else "[1]"
    del array
    with pytest.raises(InputError, match=str(path)):
        open_store(path)


def fuzz(
    store: Path, scratch: Path, rounds: int, seed: int, read: Callable[[Path], object] = verify_store
) -> tuple[int, float]:
    """Mutate the frame and read it; returns how many were refused and the slowest answer in seconds."""
    good = store.read_bytes()
    header = struct.unpack(">i", good[11:15])[0]
    trailer = len(good) - struct.unpack(">I", good[-22:-18])[0]
    places = [(0, header), (header, trailer), (trailer, len(good)), (trailer - 200, trailer), (header, header + 64)]
    refusals, slowest = 0, 0.0
    for number in range(rounds):
        rng = random.Random(seed * 1_000_003 + number)
        content, place = bytearray(good), rng.choice(places)
        for _ in range(rng.choice([1, 1, 2, 5, 30])):
            at = rng.randrange(*place)
            content[at] = rng.choice([0, 255, 127, 128, rng.randrange(256), content[at] ^ (1 << rng.randrange(8))])
        scratch.write_bytes(content[: rng.randrange(len(content))] if rng.random() < 0.1 else content)
        start = time.process_time()
        try:
            read(scratch)
        except InputError as error:
            refusals += 1 if "\n" not in str(error) else -rounds
        slowest = max(slowest, time.process_time() - start)
    return refusals, slowest


def resident_mb() -> float:
    """Resident memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


@pytest.mark.parametrize("rounds", [200, pytest.param(5_000, marks=pytest.mark.slow)])
def test_t44_mutations_end_in_input_errors_alone(store: Path, tmp_path: Path, rounds: int) -> None:
    fuzz(store, tmp_path / "x.b2nd", 20, seed=1)  # what is allocated once
    before = resident_mb()
    refusals, slowest = fuzz(store, tmp_path / "x.b2nd", rounds, seed=rounds)
    assert refusals > 0.7 * rounds  # others hit bytes that nobody reads
    assert slowest < 2
    assert resident_mb() - before < 20


def test_t44_patches_of_a_mutated_store_end_in_input_errors_alone(store: Path, tmp_path: Path) -> None:
    """Training reads patches without a checksum; each failed one costs a chunk of memory (C-Blosc2 loses it)."""
    refusals, slowest = fuzz(store, tmp_path / "x.b2nd", 200, 7, lambda path: open_store(path).hu[8:30, 5:40, 9:60])
    assert refusals > 60
    assert slowest < 2


def test_damage_is_refused_before_it_is_decompressed(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytearray(store.read_bytes())
    content[struct.unpack(">i", content[11:15])[0] + 34] ^= 255  # where the first chunk says that its blocks begin
    (tmp_path / "x.b2nd").write_bytes(content)
    monkeypatch.setattr(blosc2, "open", lambda *names, **options: pytest.fail("decompressed"))
    with pytest.raises(InputError, match="not those that were written"):
        verify_store(tmp_path / "x.b2nd")


def test_the_frame_is_what_the_format_says(store: Path) -> None:
    """Our parser and msgpack agree on the real header, so a change of format in blosc2 shows here."""
    content = store.read_bytes()
    fields = msgpack.unpackb(content[: struct.unpack(">i", content[11:15])[0]], raw=True, strict_map_key=False)
    assert fields[2] == len(content)
    frame = read_frame(store)
    assert (frame.shape, frame.chunks, frame.blocks) == ((40, 50, 70), (32, 50, 70), (16, 32, 64))
