"""The native-grid store: exact, deterministic, atomic, checksummed; damage and hostile files end in one line."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import resource
import struct
import time
from pathlib import Path

import blosc2
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.geometry import spacing_mm
from dataset.store import open_store, verify_store, write_store
from dataset.store_frame import MAX_RECORD_BYTES, read_frame
from dataset.volume_io import Volume, read_nifti
from errors import InputError, StorageError
from tests.helpers import REAL_DATA

# index (d, h, w, 1) -> RAS+ mm, LPS, with digits that float32 does not hold
AFFINE = np.array([[0, 0, -0.7031251, 180.1], [0, -0.7031251, 0, 171.3], [1.25, 0, 0, -322.7], [0, 0, 0, 1.0]])
METADATA = {"kernel": "B30f", "body": {"bounding_box_vox": [[0, 1, 2], [3, 4, 5]]}, "spacing": 0.1}


def noise(shape: tuple[int, ...] = (40, 50, 70), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1024, 3071, shape).astype(np.int16)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "a.b2nd"
    write_store(path, Volume(noise(), AFFINE), METADATA)
    return path


def test_round_trip_is_exact(store: Path) -> None:
    stored = open_store(store)
    assert stored.shape == stored.hu.shape == (40, 50, 70)
    assert stored.hu.dtype == np.int16
    assert np.array_equal(np.asarray(stored.hu), noise())
    assert np.array_equal(stored.affine, AFFINE)
    assert stored.affine.dtype == np.float64
    assert stored.spacing_mm == spacing_mm(AFFINE)
    assert stored.metadata == METADATA
    assert verify_store(store).checksum == stored.checksum


def test_it_is_a_plain_b2nd_file(store: Path) -> None:
    assert np.array_equal(blosc2.open(str(store), mode="r")[3:5, 1:9], noise()[3:5, 1:9])


def index_of(length: int) -> st.SearchStrategy[slice | int]:
    bound = st.none() | st.integers(-length - 2, length + 2)
    return st.builds(slice, bound, bound, st.sampled_from([None, 1, 2, 7])) | st.integers(-length, length - 1)


@settings(deadline=None, max_examples=40)
@given(index_of(40), index_of(50), index_of(70))
def test_slices_are_those_of_numpy(store: Path, d: slice | int, h: slice | int, w: slice | int) -> None:
    stored, expected = open_store(store), noise()
    for key in ((d, h, w), (d, h), d, (..., w)):
        assert np.array_equal(stored.hu[key], expected[key])


@settings(deadline=None, max_examples=25)
@given(st.tuples(st.integers(1, 70), st.integers(1, 140), st.integers(1, 140)), st.integers(0, 9))
def test_any_shape(tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, int, int], seed: int) -> None:
    path = tmp_path_factory.getbasetemp() / "shape.b2nd"
    hu = noise(shape, seed)
    write_store(path, Volume(hu, AFFINE), {})
    assert np.array_equal(verify_store(path).hu[...], hu)


def test_the_same_volume_gives_the_same_bytes(tmp_path: Path) -> None:
    volume = Volume(noise((70, 130, 140)), AFFINE)
    flipped = Volume(np.ascontiguousarray(volume.hu[:, ::-1])[:, ::-1], AFFINE)  # the same voxels, other strides
    for number, one in enumerate([volume, volume, flipped]):
        write_store(tmp_path / f"{number}.b2nd", one, dict(reversed(METADATA.items())) if number else METADATA)
    assert len({(tmp_path / f"{number}.b2nd").read_bytes() for number in range(3)}) == 1


def test_out_of_range_reads_raise_as_numpy_does(store: Path) -> None:
    with pytest.raises(IndexError):
        open_store(store).hu[40]


def read_in_child(stored: object, queue: multiprocessing.Queue) -> None:
    queue.put(int(stored.hu[5, 6, 7]))  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_handles_are_opened_by_the_process_that_reads(store: Path, method: str) -> None:
    stored = open_store(store)
    assert stored.hu[5, 6, 7] == noise()[5, 6, 7]  # the parent's handle is open
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=read_in_child, args=(stored, queue))
    process.start()
    assert queue.get(timeout=60) == noise()[5, 6, 7]
    process.join()


def test_pickles_as_its_path(store: Path) -> None:
    stored = open_store(store)
    stored.hu[0]
    again = pickle.loads(pickle.dumps(stored))
    assert len(pickle.dumps(stored)) < 3000
    assert np.array_equal(again.hu[1], noise()[1])


def test_volumes_that_cannot_be_stored(tmp_path: Path) -> None:
    path = tmp_path / "a.b2nd"
    for hu, affine, metadata in [
        (noise((0, 4, 4)), AFFINE, {}),
        (noise((4, 4)), AFFINE, {}),
        (np.full((2, 2, 2), np.nan), AFFINE, {}),
        (noise((2, 2, 2)), np.zeros((4, 4)), {}),
        (noise((2, 2, 2)), AFFINE, {"note": "x" * MAX_RECORD_BYTES}),
    ]:
        with pytest.raises(InputError):
            write_store(path, Volume(hu, affine), metadata)
    assert not list(tmp_path.iterdir())
    with pytest.raises(StorageError, match="does not exist"):
        write_store(tmp_path / "no" / "a.b2nd", Volume(noise((2, 2, 2)), AFFINE), {})


def write_and_die(path: Path) -> None:
    os.replace = lambda *names: os._exit(9)  # type: ignore[assignment]
    write_store(path, Volume(noise(seed=1), AFFINE), {})


def test_t31_a_kill_during_a_write_leaves_the_old_store(tmp_path: Path) -> None:
    path = tmp_path / "a.b2nd"
    write_store(path, Volume(noise(), AFFINE), METADATA)
    before = path.read_bytes()
    process = multiprocessing.get_context("fork").Process(target=write_and_die, args=(path,))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    assert path.read_bytes() == before
    verify_store(path)


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
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    assert words in refused(tmp_path / "x.b2nd", content)
    assert time.monotonic() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


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


def fuzz(store: Path, scratch: Path, rounds: int, seed: int) -> tuple[int, float]:
    """Mutate the frame; returns how many were refused and the slowest answer in seconds."""
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
        start = time.monotonic()
        try:
            verify_store(scratch)
        except InputError as error:
            refusals += 1 if "\n" not in str(error) else -rounds
        slowest = max(slowest, time.monotonic() - start)
    return refusals, slowest


# Known defect: resident memory grows by some 40 MB in 450 mutated files, evenly; where it is kept is not found yet.
KNOWN = pytest.mark.xfail(
    reason="reading thousands of damaged stores in one process leaks about 0.1 MB each", strict=False
)


@pytest.mark.parametrize("rounds", [200, pytest.param(10_000, marks=[pytest.mark.slow, KNOWN])])
def test_t44_mutations_end_in_input_errors_alone(store: Path, tmp_path: Path, rounds: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusals, slowest = fuzz(store, tmp_path / "x.b2nd", rounds, seed=rounds)
    assert refusals > 0.7 * rounds  # others hit bytes that nobody reads
    assert slowest < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000


def test_the_frame_is_what_the_format_says(store: Path) -> None:
    """Our parser and msgpack agree on the real header, so a change of format in blosc2 shows here."""
    content = store.read_bytes()
    fields = msgpack.unpackb(content[: struct.unpack(">i", content[11:15])[0]], raw=True, strict_map_key=False)
    assert fields[2] == len(content)
    frame = read_frame(store)
    assert (frame.shape, frame.chunks, frame.blocks) == ((40, 50, 70), (32, 50, 70), (16, 32, 64))


@pytest.mark.parametrize("name", ["lidc_0001", pytest.param("lidc_0002", marks=pytest.mark.slow)])
def test_real_ct_takes_less_than_045_of_raw(tmp_path: Path, name: str) -> None:
    source = REAL_DATA / "ct_native" / f"{name}.nii.gz"
    if not source.exists():
        pytest.skip("shared/data is not here")
    volume = read_nifti(source)
    path = tmp_path / "a.b2nd"
    write_store(path, volume, {})
    assert path.stat().st_size < 0.45 * volume.hu.nbytes
    assert np.array_equal(open_store(path).hu[20:60, 100:300, 200:400], volume.hu[20:60, 100:300, 200:400])
