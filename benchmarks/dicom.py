"""Speed of DICOM -> HU volume -> training store, every check included, beside SimpleITK's reader, in one run.

SimpleITK checks nothing and has no store: it is its reader alone that stands beside ours. One process each; the rows
"two workers" give several series to two processes, ours to the store, and SimpleITK's reader in one and in two.

python benchmarks/dicom.py [--quick] [--json FILE] [--input FOLDER ...]
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import SimpleITK

from benchmarks.harness import Row, medians, print_table, standard_parser, time_interleaved, write_report
from dataset.phantom_dicom import SeriesTags, phantom_volume, write_dicom_series
from dataset.store import write_store
from dataset.volume_io import Volume, write_nifti
from preprocess.dicom_header import read_header
from preprocess.dicom_index import index_tree
from preprocess.dicom_series import read_series

SIZE_DHW, QUICK_DHW = (200, 512, 512), (24, 128, 128)
WORKERS, SERIES = 2, 4


def ours(folder: Path) -> Volume:
    """Folder -> validated HU volume: index, headers, geometry, pixels."""
    (files,) = index_tree(folder).studies.values()
    return read_series([frame for path in files for frame in read_header(path)]).volume


def simpleitk(folder: Path) -> np.ndarray:
    """The same folder by SimpleITK: sorted file names, pixels."""
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return SimpleITK.GetArrayFromImage(reader.Execute())


def stored(scratch: Path, folder: Path) -> int:
    """A folder's series to a store, in one worker; its slices."""
    volume = ours(folder)
    write_store(scratch / f"{os.getpid()}.b2nd", volume, {})
    return len(volume.hu)


def read_alone(folder: Path) -> int:
    """A folder's series by SimpleITK, in one worker; its slices."""
    return len(simpleitk(folder))


def rows_of_workers(name: str, folder: Path, rounds: int) -> list[Row]:
    """Slices per second of `SERIES` readings of a folder by `WORKERS` processes, each with one thread."""
    series = [folder] * SERIES
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(WORKERS, get_context("spawn")) as pool:
        store = partial(stored, Path(scratch))
        times = time_interleaved(
            {
                "ours": lambda: list(pool.map(store, series)),
                "SimpleITK": lambda: [read_alone(each) for each in series],
                "SimpleITK, two": lambda: list(pool.map(read_alone, series)),
            },
            rounds,
        )
        slices = sum(map(read_alone, series))
    rate = {what: slices / seconds for what, seconds in medians(times).items()}
    return [
        Row.compared(f"{name}: to stores, two workers", rate["ours"], "slices/s", rate["SimpleITK"], "higher"),
        Row.compared(f"{name}: the same, two readers", rate["ours"], "slices/s", rate["SimpleITK, two"], "higher"),
    ]


def phantom_series(folder: Path, size_dhw: tuple[int, int, int]) -> Path:
    """A series of phantom slices with noise; a few slices repeated, because painting 200 takes a minute."""
    few, tags = phantom_volume(0, (8, *size_dhw[1:]))
    affine = few.affine.copy()
    affine[:3, 0] *= len(few.hu) / size_dhw[0]  # the same patient in thinner slices
    volume = Volume(np.resize(few.hu, size_dhw), affine)
    write_dicom_series(volume, folder, SeriesTags(tags.patient))
    return folder


def rows_of(name: str, folder: Path, rounds: int) -> list[Row]:
    """Slices per second of a folder that holds one series: to memory, to a store and to ``.nii.gz``.

    A store is compared with SimpleITK's reader alone, which has none.
    """
    volume, reference = ours(folder), simpleitk(folder)
    if not np.array_equal(volume.hu, np.maximum(reference, -1024)):
        raise AssertionError(f"{folder}: we and SimpleITK disagree on its voxels")
    with tempfile.TemporaryDirectory() as scratch:
        target, other = Path(scratch) / "ours.nii.gz", os.path.join(scratch, "theirs.nii.gz")

        def theirs_written() -> None:
            reader = SimpleITK.ImageSeriesReader()
            reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
            SimpleITK.WriteImage(reader.Execute(), other)

        reading: dict[str, Callable[[], object]] = {
            "ours": lambda: ours(folder),
            "ours, stored": lambda: write_store(Path(scratch) / "ours.b2nd", ours(folder), {}),
            "SimpleITK": lambda: simpleitk(folder),
        }
        writing: dict[str, Callable[[], object]] = {
            "ours, written": lambda: write_nifti(target, ours(folder)),
            "SimpleITK, written": theirs_written,
        }
        # writing takes ten times as long and is compression almost alone: one round will do
        times = time_interleaved(reading, rounds) | time_interleaved(writing, 1, warmup=0)
        rate = {what: len(volume.hu) / seconds for what, seconds in medians(times).items()}
    return [
        Row.compared(f"{name}: to memory", rate["ours"], "slices/s", rate["SimpleITK"], "higher"),
        Row.compared(f"{name}: to a store", rate["ours, stored"], "slices/s", rate["SimpleITK"], "higher"),
        Row.compared(f"{name}: to .nii.gz", rate["ours, written"], "slices/s", rate["SimpleITK, written"], "higher"),
    ]


def main() -> None:
    """Measure, print, write."""
    parser = standard_parser(__doc__ or "")
    parser.add_argument(
        "--input", type=Path, nargs="*", default=[], help="folders of one series each, beside the phantom"
    )
    arguments = parser.parse_args()
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    size, rounds = (QUICK_DHW, 1) if arguments.quick else (SIZE_DHW, 5)
    with tempfile.TemporaryDirectory() as scratch:
        folder = phantom_series(Path(scratch), size)
        name = f"uncompressed {size[0]}×{size[1]}×{size[2]}"
        rows = rows_of(name, folder, rounds) + rows_of_workers(name, folder, rounds)
    for folder in arguments.input:
        rows += rows_of(folder.name, folder, rounds) + rows_of_workers(folder.name, folder, rounds)
    print_table(rows)
    if arguments.json:
        write_report(arguments.json, rows, packages=("SimpleITK", "pydicom", "pylibjpeg-libjpeg"))


if __name__ == "__main__":
    main()
