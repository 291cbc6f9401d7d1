"""A generated volume as a DICOM series that says of itself that it is synthetic.

Reference: DICOM PS3.3 C.7.6.1.1.2 (image type: derived, secondary), C.7.6.1.1.3 (derivation description).
"""

from __future__ import annotations

from pathlib import Path

from pydicom import dcmread, dcmwrite
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError

from dataset.atomic import atomic_write
from dataset.phantom_dicom import SeriesTags, slice_datasets
from dataset.volume_io import Volume
from ddpm.ctpa_volume import NOTICE
from errors import InputError, StorageError

_DERIVATION = "Drawn by a diffusion model from chest radiographs. No patient was scanned. " + NOTICE + "."


def write_synthetic_series(volume: Volume, folder: Path, key: str) -> list[Path]:
    """Write single-slice CT images, ``IM0001.dcm`` at the inferior end; each is there whole or not at all.

    Args:
        volume: int16 HU from -1024 on.
        folder: exists; other files in it stay, but no slice of another series.
        key: of the result; UIDs follow from it.

    Returns:
        The files, in order.

    Raises:
        InputError: the folder holds slices of another result.
        StorageError: the disk refuses.
    """
    tags = SeriesTags(key, kernel="", contrast="", description=NOTICE)
    paths: list[Path] = []
    try:
        for index, header in enumerate(slice_datasets(volume, tags)):
            if not index:
                _refuse_others(folder, str(header.SeriesInstanceUID))
            paths.append(folder / f"IM{index + 1:04d}.dcm")
            # half a slice could not be told from another result's, and nobody could go on
            with atomic_write(paths[-1]) as handle:
                dcmwrite(handle, _synthetic(header), enforce_file_format=True)
    except OSError as error:
        raise StorageError(f"{folder}: not written ({error.strerror}): free space or choose another folder") from error
    return paths


def _synthetic(header: Dataset) -> Dataset:
    """Nobody's image, derived, by no scanner."""
    header.ImageType = ["DERIVED", "SECONDARY", "AXIAL"]
    header.Manufacturer, header.ManufacturerModelName = "X-ray2CTPA", "latent diffusion"
    header.PatientName, header.PatientID = "SYNTHETIC", "SYNTHETIC"
    header.StudyID = ""
    header.StudyDescription, header.SeriesDescription = NOTICE, NOTICE
    header.ImageComments, header.DerivationDescription = NOTICE, _DERIVATION
    header.BurnedInAnnotation = "NO"
    header.KVP = None  # no tube was on
    del header.ConvolutionKernel
    return header


def _refuse_others(folder: Path, series: str) -> None:
    """A series with slices of another one among them is worse than none."""
    for path in sorted(folder.glob("IM*.dcm")):
        try:
            found = str(dcmread(path, stop_before_pixels=True, specific_tags=["SeriesInstanceUID"]).SeriesInstanceUID)
        except (InvalidDicomError, AttributeError, ValueError, EOFError):
            found = "?"
        if found != series:
            raise InputError(f"{path}: belongs to another result: remove it, or choose another folder")
