from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ImplicitVRLittleEndian

from benchmarks.memory import PeakMemory
from errors import InputError
from preprocess.dicom_header import NotDicomError, NotImageError, read_header
from preprocess.dicom_index import identify
from preprocess.dicom_series import read_series
from tests.helpers import REAL_DATA
from tests.preprocess.dicom_factory import compressed, datasets, enhanced, random_volume, write

REAL = REAL_DATA / "dicom" / "transfer_syntaxes"
MUTATIONS = 120


def kinds(folder: Path) -> dict[str, list[Path]]:
    """Two slices of every way to store them."""
    volume = random_volume((2, 10, 8))

    def stored(syntax: str) -> list[Dataset]:
        slices = datasets(volume)
        for dataset in slices:
            dataset.file_meta.TransferSyntaxUID = syntax
        return slices

    made = {
        "explicit": datasets(volume),
        "implicit": stored(ImplicitVRLittleEndian),
        "deflated": stored(DeflatedExplicitVRLittleEndian),
        "rle": [compressed(dataset) for dataset in datasets(volume)],
        "enhanced": [enhanced(volume)],
    }
    return {name: write(folder / name, slices) for name, slices in made.items()}


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, a piece lost, repeated, or overwritten by sizes that lie."""
    data = bytearray(content)
    kind = rng.randrange(5)
    begin = rng.randrange(len(data) - 1)
    length = rng.randrange(1, 64)
    if kind == 0:
        for _ in range(rng.randrange(1, 9)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == 1:
        del data[begin:]
    elif kind == 2:
        del data[begin : begin + length]
    elif kind == 3:
        data[begin:begin] = data[begin : begin + length] * rng.randrange(1, 50)
    else:
        data[begin : begin + 4] = rng.choice([b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", bytes(4), b"\xfe\xff\x00\xe0"])
    return bytes(data)


def load(paths: list[Path]) -> None:
    """All that the converter does with files that anybody may have made."""
    frames = []
    for path in paths:
        identify(str(path))
        frames += read_header(path)
    hu = read_series(frames).volume.hu
    assert hu.dtype == np.int16


def check(path: Path, others: list[Path], content: bytes, seed: int, count: int) -> int:
    """Mutate one file ``count`` times; returns how often that was noticed."""
    rng = random.Random(seed)
    refused = 0
    for number in range(count):
        path.write_bytes(mutated(content, rng))
        begin = time.process_time()
        try:
            load([path, *others])
        except InputError:
            refused += 1
        except (NotDicomError, NotImageError):  # the prefix or the object's class was hit: the file is foreign now
            refused += 1
        except Exception as error:
            raise AssertionError(f"mutation {number}: {type(error).__name__}: {error}") from error
        assert time.process_time() - begin < 2.0, f"mutation {number} took too long"
    return refused


@pytest.mark.parametrize("kind", ["explicit", "implicit", "deflated", "rle", "enhanced"])
def test_t44_mutated_files_raise_input_error_only(tmp_path: Path, kind: str) -> None:
    path, *others = kinds(tmp_path)[kind]
    with PeakMemory() as memory:
        refused = check(path, others, path.read_bytes(), seed=44, count=MUTATIONS)
    assert refused > MUTATIONS // 4
    assert memory.bytes < 500e6


@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data/dicom")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["CT1_J2KR", "CT1_JLSL", "CT1_JPLL", "CT1_RLE"])
def test_t44_mutated_code_streams_raise_input_error_only(tmp_path: Path, name: str) -> None:
    content = (REAL / name).read_bytes()
    path, other = tmp_path / "IM0000.dcm", tmp_path / "IM0001.dcm"
    moved = content.replace(b"-75.699997", b"-80.699997")
    assert moved != content
    other.write_bytes(moved)
    check(path, [other], content, seed=45, count=40)


def test_t44_random_bytes_behind_a_prefix(tmp_path: Path) -> None:
    rng = random.Random(46)
    path = tmp_path / "IM0000.dcm"
    for _ in range(100):
        path.write_bytes(bytes(128) + b"DICM" + rng.randbytes(rng.randrange(400)))
        with pytest.raises((InputError, NotImageError)):
            read_header(path)
