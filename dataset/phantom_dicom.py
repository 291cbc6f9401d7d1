"""A volume, most often a phantom thorax, as a valid DICOM CT series: input for the DICOM converter anywhere.

Reference: DICOM PS3.3 A.3 (CT image), PS3.10 (files).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom import dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from dataset.geometry import spacing_mm
from dataset.phantom import make_phantom
from dataset.volume_io import Volume, to_int16_hu
from errors import ConfigurationError, StorageError
from params import BASELINE_SIZE_DHW

_INTERCEPT_HU = -1024
_BITS = 16


@dataclass(frozen=True)
class SeriesTags:
    """What the headers of a series say, besides its geometry; equal tags give equal UIDs.

    Attributes:
        patient: PatientID and name.
        study: number of the study.
        series: number of the series.
        kernel: reconstruction kernel.
        kvp: tube voltage.
        contrast: contrast agent, "" for none.
        description: SeriesDescription.
    """

    patient: str
    study: int = 1
    series: int = 1
    kernel: str = "STANDARD"
    kvp: float = 100.0
    contrast: str = "IODINE"
    description: str = "CT CHEST PE PROTOCOL"


def phantom_volume(
    seed: int,
    size_dhw: tuple[int, int, int] = BASELINE_SIZE_DHW,
    spacing: tuple[float, float, float] | None = None,
) -> tuple[Volume, SeriesTags]:
    """A phantom thorax and the tags that fit its scan.

    Args:
        seed: of the patient.
        size_dhw: voxels.
        spacing: mm along (D, H, W); None shows the whole thorax.

    Raises:
        ConfigurationError: a bad seed, size or spacing.
    """
    phantom = make_phantom(seed, size_dhw, spacing)
    sharp = phantom.patient.kernel_sharpness > 0.5
    tags = SeriesTags(f"phantom_{seed:05d}", kvp=phantom.patient.kvp, kernel="LUNG" if sharp else "STANDARD")
    return Volume(phantom.hu, phantom.affine, source=tags.patient), tags


def write_dicom_series(volume: Volume, folder: str | os.PathLike[str], tags: SeriesTags) -> list[Path]:
    """Write a volume as single-slice CT images, ``IM0001.dcm`` at the inferior end, explicit VR little endian.

    Args:
        volume: standard axes; its affine may be oblique, not sheared.
        folder: is created.
        tags: what else the headers say.

    Returns:
        The files, in order.

    Raises:
        ConfigurationError: the affine is sheared.
        StorageError: the disk refuses.
    """
    folder = Path(folder)
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for index, dataset in enumerate(slice_datasets(volume, tags)):
            paths.append(folder / f"IM{index + 1:04d}.dcm")
            dcmwrite(paths[-1], dataset, enforce_file_format=True)
    except OSError as error:
        raise StorageError(f"{folder}: not written ({error.strerror}): free space or choose another folder") from error
    return paths


def slice_datasets(volume: Volume, tags: SeriesTags) -> Iterator[Dataset]:
    """The slices of a volume as DICOM data sets, from D = 0 on.

    Raises:
        ConfigurationError: the affine is sheared.
    """
    to_lps = np.diag([-1.0, -1.0, 1.0])
    axes_mm = to_lps @ volume.affine[:3, :3]
    step_mm, height_mm, width_mm = spacing_mm(volume.affine)
    along_row, along_column = axes_mm[:, 2] / width_mm, axes_mm[:, 1] / height_mm
    normal = np.cross(along_row, along_column)
    if abs(along_row @ along_column) > 1e-6 or np.abs(normal * step_mm - axes_mm[:, 0]).max() > 1e-6 * step_mm:
        raise ConfigurationError(f"{volume.source or 'volume'}: a sheared volume is no DICOM series: resample it first")
    origin_mm = to_lps @ volume.affine[:3, 3]
    hu = to_int16_hu(volume.hu)[0]
    study_uid = _uid(tags.patient, tags.study)
    series_uid = _uid(tags.patient, tags.study, tags.series)
    for index, plane in enumerate(hu):
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.SOPClassUID = CTImageStorage
        dataset.SOPInstanceUID = _uid(tags.patient, tags.study, tags.series, index)
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        dataset.Modality, dataset.Manufacturer = "CT", "XRay2CTPA phantom"
        dataset.SeriesDescription = tags.description
        dataset.PatientName, dataset.PatientID = tags.patient, tags.patient
        dataset.PatientBirthDate = dataset.PatientSex = ""
        dataset.StudyDate = dataset.StudyTime = dataset.AccessionNumber = dataset.ReferringPhysicianName = ""
        dataset.StudyID, dataset.PatientPosition = str(tags.study), "HFS"
        if tags.contrast:
            dataset.ContrastBolusAgent = tags.contrast
        dataset.SliceThickness, dataset.KVP = _decimal(step_mm), _decimal(tags.kvp)
        dataset.ConvolutionKernel = tags.kernel
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study_uid, series_uid
        dataset.FrameOfReferenceUID, dataset.PositionReferenceIndicator = _uid(tags.patient, tags.study, "frame"), ""
        dataset.SeriesNumber, dataset.AcquisitionNumber, dataset.InstanceNumber = tags.series, 1, index + 1
        dataset.ImagePositionPatient = [_decimal(mm) for mm in origin_mm + index * axes_mm[:, 0]]
        dataset.ImageOrientationPatient = [_decimal(value) for value in (*along_row, *along_column)]
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.Rows, dataset.Columns = plane.shape
        dataset.PixelSpacing = [_decimal(height_mm), _decimal(width_mm)]
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = _BITS, _BITS, _BITS - 1
        dataset.PixelRepresentation = 0
        dataset.RescaleIntercept, dataset.RescaleSlope, dataset.RescaleType = str(_INTERCEPT_HU), "1", "HU"
        stored = np.clip(plane.astype(np.int32) - _INTERCEPT_HU, 0, None)
        dataset.PixelData = stored.astype("<u2").tobytes()
        yield dataset


def _uid(*parts: object) -> str:
    return str(generate_uid(entropy_srcs=[repr(parts)]))  # the same parts, the same UID


def _decimal(value: float) -> str:
    """A DICOM decimal string: 16 characters at most, as exact as they allow."""
    for digits in range(15, 5, -1):
        text = f"{value + 0.0:.{digits}g}"
        if len(text) <= 16:
            return text
    return f"{value:.6e}"
