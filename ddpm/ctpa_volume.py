"""A generated CTPA volume: voxels, where they lie, how they came about; and the files that hold it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dataset.atomic import make_folder
from dataset.geometry import spacing_mm
from dataset.volume_io import Volume, WriteReport, to_int16_hu, write_nifti
from errors import ConfigurationError, InputError

NOTICE = "SYNTHETIC, not for diagnosis"
_DICOM_FLOOR_HU = -1024  # the intercept of the series: stored values are not negative


@dataclass(frozen=True, eq=False)
class CTPAVolume:
    """What `vqgan_inference.XRay2CTPA.generate` gives.

    Attributes:
        samples_hu: float32 (samples, D, H, W) in HU, D inferior→superior, H anterior→posterior, W right→left.
        affine: float64 (4, 4), index (d, h, w, 1) -> RAS+ mm.
        provenance: JSON-able; the same for the same result. It holds no name, no path, no date and no text.
    """

    samples_hu: np.ndarray
    affine: np.ndarray
    provenance: dict[str, Any]

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel spacing (d, h, w) in mm."""
        return spacing_mm(self.affine)

    @property
    def samples(self) -> list[np.ndarray]:
        """Each sample, float32 HU (D, H, W)."""
        return list(self.samples_hu)

    @cached_property
    def hu(self) -> np.ndarray:
        """The first sample, int16 HU (D, H, W): a thorax that may be, sharp as one. For the average see `mean`."""
        return to_int16_hu(self.samples_hu[0])[0]

    @cached_property
    def mean(self) -> np.ndarray:
        """Mean of the samples, float32 HU (D, H, W): nearest to the truth on average, and blurred where they differ."""
        return self.samples_hu.mean(axis=0, dtype=np.float64).astype(np.float32)

    @cached_property
    def uncertainty_hu(self) -> np.ndarray:
        """Standard deviation over the samples, float32 HU (D, H, W).

        Raises:
            ConfigurationError: there is one sample.
        """
        if len(self.samples_hu) < 2:
            raise ConfigurationError("one sample has no spread: generate with samples=2 or more")
        return self.samples_hu.std(axis=0, ddof=1, dtype=np.float64).astype(np.float32)

    @property
    def key(self) -> str:
        """SHA-256 (hex) of the provenance: the name of this result."""
        return hashlib.sha256(json.dumps(self.provenance, sort_keys=True).encode()).hexdigest()

    def save_nifti(self, path: str | os.PathLike[str]) -> dict[Path, WriteReport]:
        """Write int16 NIfTI: the first sample as ``path``; of several also mean, spread and the others beside it.

        They are named ``<stem>_mean``, ``<stem>_uncertainty`` and ``<stem>_sample_2`` and so on.

        Returns:
            For each file how many voxels were changed by rounding and clipping.

        Raises:
            ConfigurationError: the name ends neither in .nii nor in .nii.gz.
            StorageError: the disk refuses.
        """
        volumes = [self.samples_hu[0]]
        if len(self.samples_hu) > 1:
            volumes += [self.mean, self.uncertainty_hu, *self.samples_hu[1:]]
        names = nifti_names(path, len(self.samples_hu))
        return {
            name: write_nifti(name, Volume(hu, self.affine, source=NOTICE))
            for name, hu in zip(names, volumes, strict=True)
        }

    def save_dicom(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write the first sample as a derived CT series, ``IM0001.dcm`` at the inferior end.

        UIDs follow from the provenance: the same result has the same ones wherever it is made, another result others.
        There is no patient in it, and every header says that it is synthetic.

        Returns:
            The files, in order.

        Raises:
            InputError: the folder holds DICOM files of another result, or a voxel lies below -1024 HU.
            StorageError: the disk refuses.
        """
        from ddpm.ctpa_dicom import write_synthetic_series  # pydicom, which nothing else here needs

        if int(self.hu.min()) < _DICOM_FLOOR_HU:
            raise InputError(
                f"{folder}: {int(self.hu.min())} HU cannot be stored in a CT series from {_DICOM_FLOOR_HU} HU"
            )
        make_folder(Path(folder), "choose another folder")
        return write_synthetic_series(Volume(self.hu, self.affine), Path(folder), self.key)

    def save_png(self, path: str | os.PathLike[str]) -> None:
        """Write three planes in the lung and the mediastinal window, of several samples their spread too.

        Raises:
            StorageError: the disk refuses.
        """
        from ddpm.ctpa_panel import volume_panel
        from evaluation.panels import save_panel

        spread = self.uncertainty_hu if len(self.samples_hu) > 1 else None
        save_panel(volume_panel(self.hu, spread, self.spacing_mm), path)


def nifti_names(path: str | os.PathLike[str], samples: int) -> list[Path]:
    """The files that `CTPAVolume.save_nifti` writes, in order.

    Raises:
        ConfigurationError: the name ends neither in .nii nor in .nii.gz.
    """
    path = Path(path)
    suffix = next((end for end in (".nii.gz", ".nii") if path.name.lower().endswith(end)), None)
    if suffix is None:
        raise ConfigurationError(f"{path}: a NIfTI file ends in .nii or .nii.gz: choose such a name")
    if samples == 1:
        return [path]
    stem, ending = path.name[: -len(suffix)], path.name[-len(suffix) :]
    parts = ["mean", "uncertainty", *(f"sample_{number}" for number in range(2, samples + 1))]
    return [path, *(path.with_name(f"{stem}_{part}{ending}") for part in parts)]
