"""Small DICOM series with one thing wrong each."""

from __future__ import annotations

import contextlib
import io
import subprocess
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

import numpy as np
from pydicom import Sequence as DicomSequence
from pydicom import dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import EnhancedCTImageStorage, ExplicitVRLittleEndian, RLELossless, generate_uid

from dataset.phantom import affine_of
from dataset.phantom_dicom import SeriesTags, slice_datasets
from dataset.volume_io import Volume
from errors import run_command
from preprocess import dicom_to_nifti
from preprocess.dicom_header import Slice, read_header

TAGS = SeriesTags("P0")
Change = Callable[[Dataset, int], None]


def convert(source: Path, output: Path, *options: str, check: int | None = 0) -> subprocess.CompletedProcess[str]:
    """The converter's command line in this process, which spares the seconds of an interpreter's start."""
    argv = ["dicom_to_nifti.py", "--input", str(source), "--output", str(output), *options]
    out, err = io.StringIO(), io.StringIO()
    with mock.patch("sys.argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_command(lambda: dicom_to_nifti.main(dicom_to_nifti.parse_arguments()))
    assert check is None or code == check, f"exit {code}\n{out.getvalue()}\n{err.getvalue()}"
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())


def random_volume(
    size_dhw: tuple[int, int, int] = (6, 10, 8),
    spacing_mm: tuple[float, float, float] = (2.0, 0.75, 0.5),
    seed: int = 0,
) -> Volume:
    """Random HU with air among it, so that every flip and swap shows."""
    hu = np.random.default_rng(seed).integers(-1024, 3000, size_dhw).astype(np.int16)
    affine = affine_of(size_dhw, spacing_mm)
    affine[:3, 3] += (3.25, -7.5, 11.0)
    return Volume(hu, affine)


def datasets(volume: Volume, change: Change | None = None, tags: SeriesTags = TAGS) -> list[Dataset]:
    """The slices of a volume, each handed to ``change`` with its index."""
    result = list(slice_datasets(volume, tags))
    for index, dataset in enumerate(result):
        if change is not None:
            change(dataset, index)
    return result


def write(folder: Path, slices: Iterable[Dataset], name: str = "IM{:04d}.dcm") -> list[Path]:
    """Write slices as files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hostile values are meant
        for index, dataset in enumerate(slices):
            paths.append(folder / name.format(index))
            dcmwrite(paths[-1], dataset, enforce_file_format=True)
    return paths


def series(folder: Path, volume: Volume, change: Change | None = None, tags: SeriesTags = TAGS) -> list[Path]:
    """A volume as files."""
    return write(folder, datasets(volume, change, tags))


def frames_of(paths: Iterable[Path]) -> list[Slice]:
    """Headers of files."""
    return [frame for path in paths for frame in read_header(path)]


def set_stored(dataset: Dataset, stored: np.ndarray, kind: str = "<u2") -> None:
    """Replace the stored pixels."""
    dataset.PixelData = stored.astype(kind).tobytes()


def stored_of(dataset: Dataset) -> np.ndarray:
    """Stored pixels of an uncompressed slice."""
    return np.frombuffer(dataset.PixelData, "<u2").reshape(dataset.Rows, dataset.Columns)


def compressed(dataset: Dataset) -> Dataset:
    """The slice in RLE, the one compression that pydicom itself writes."""
    dataset.compress(RLELossless, generate_instance_uid=False)
    return dataset


def enhanced(volume: Volume, tags: SeriesTags = TAGS, shuffle: bool = False) -> Dataset:
    """A volume as one enhanced multi-frame CT; positions per frame, the rest shared."""
    slices = datasets(volume, tags=tags)
    order = list(range(len(slices)))
    if shuffle:
        order = list(np.random.default_rng(1).permutation(len(slices)))
    first = slices[0]
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = EnhancedCTImageStorage, generate_uid(entropy_srcs=["enhanced"])
    for keyword in (
        "ImageType", "Modality", "Manufacturer", "PatientName", "PatientID", "StudyInstanceUID", "SeriesInstanceUID",
        "FrameOfReferenceUID", "SamplesPerPixel", "PhotometricInterpretation", "Rows", "Columns", "BitsAllocated",
        "BitsStored", "HighBit", "PixelRepresentation",
    ):  # fmt: skip
        setattr(dataset, keyword, getattr(first, keyword))
    shared, measures, plane, values = Dataset(), Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = first.PixelSpacing, first.SliceThickness
    plane.ImageOrientationPatient = first.ImageOrientationPatient
    values.RescaleIntercept, values.RescaleSlope, values.RescaleType = "-1024", "1", "HU"
    shared.PixelMeasuresSequence = DicomSequence([measures])
    shared.PlaneOrientationSequence = DicomSequence([plane])
    shared.PixelValueTransformationSequence = DicomSequence([values])
    dataset.SharedFunctionalGroupsSequence = DicomSequence([shared])
    groups = []
    for index in order:
        group, position = Dataset(), Dataset()
        position.ImagePositionPatient = slices[index].ImagePositionPatient
        group.PlanePositionSequence = DicomSequence([position])
        groups.append(group)
    dataset.PerFrameFunctionalGroupsSequence = DicomSequence(groups)
    dataset.NumberOfFrames = len(slices)
    dataset.PixelData = b"".join(slices[index].PixelData for index in order)
    return dataset
