"""A small radiograph with known sides, and files of every kind that hold it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from dataset.phantom import make_phantom
from dataset.projection import project_parallel
from dataset.xray import load_xray

# The steepest part of the standard histogram's map stretches a step of 8 bits to this.
EIGHT_BIT_STEP = 0.02


@cache
def radiograph() -> np.ndarray:
    """uint16 (220, 180) over the whole range: head up, heart on the right, bones bright; no two sides alike."""
    phantom = make_phantom(3, (44, 36, 36))
    picture = project_parallel(torch.from_numpy(phantom.hu), phantom.spacing_mm).numpy()
    picture = ndimage.zoom(picture, 5, order=3)
    picture = (picture - picture.min()) / np.ptp(picture)
    return np.rint(picture * 65535).astype(np.uint16)


def eight_bit() -> np.ndarray:
    """The same as uint8."""
    return np.rint(radiograph() / 257).astype(np.uint8)


def save_picture(path: Path, mode: str, **options: Any) -> Path:
    """Write the radiograph in a mode of Pillow."""
    grey = Image.fromarray(eight_bit())
    if mode == "I;16":
        image = Image.fromarray(radiograph())
    elif mode in ("RGBA", "LA"):
        image = grey.convert(mode)
    elif mode == "P":
        # a palette in an order of its own: the index says nothing of the brightness
        order = np.random.default_rng(0).permutation(256).astype(np.uint8)
        image = Image.fromarray(np.argsort(order).astype(np.uint8)[eight_bit()], mode="P")
        image.putpalette(np.repeat(order, 3).tobytes())
    else:
        image = grey.convert(mode)
    image.save(path, **options)
    return path


def save_dicom(
    path: Path,
    pixels: np.ndarray | None = None,
    *,
    photometric: str = "MONOCHROME2",
    bits: int = 16,
    syntax: str = "1.2.840.10008.1.2.1",
    **elements: Any,
) -> Path:
    """Write a DX image; ``elements`` are further data elements by keyword, None removes one."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid

    pixels = radiograph() >> (16 - bits) if pixels is None else pixels
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID("1.2.840.10008.5.1.4.1.1.1.1")
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[str(path)])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    header.SOPClassUID, header.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    header.PatientName, header.PatientID = "Canary^Yellow", "CANARY-4711"
    header.PatientBirthDate, header.InstitutionName = "19400305", "Canary Hospital"
    header.Modality = "DX"
    header.ViewPosition = "PA"
    header.PatientOrientation = ["L", "F"]
    header.SamplesPerPixel = 1
    header.PhotometricInterpretation = photometric
    header.Rows, header.Columns = pixels.shape[:2]
    header.BitsAllocated = 8 * pixels.dtype.itemsize
    header.BitsStored, header.HighBit = bits, bits - 1
    header.PixelRepresentation = 0
    header.PixelData = np.ascontiguousarray(pixels).tobytes()
    for name, value in elements.items():
        if value is None:
            delattr(header, name)
        else:
            setattr(header, name, value)
    if syntax != ExplicitVRLittleEndian:
        header.compress(UID(syntax), generate_instance_uid=False)
    header.save_as(path, enforce_file_format=True)
    return path


def luts(kind: str, table: np.ndarray, first: int = 0) -> dict[str, Any]:
    """A Modality or VOI LUT sequence."""
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(table) % 65536, first, 16])
    item.add_new("LUTData", "OW", table.astype("<u2").tobytes())
    if kind == "Modality":
        item.ModalityLUTType = "US"
    return {f"{kind}LUTSequence": Sequence([item])}


def assert_same(path: Path, reference: torch.Tensor, tolerance: float = EIGHT_BIT_STEP) -> None:
    """The file gives the reference tensor of side 96."""
    image = load_xray(path, 96).image
    assert image.dtype == torch.float32
    assert image.shape == (1, 96, 96)
    assert float(image.min()) >= 0
    assert float(image.max()) <= 1
    assert float((image - reference).abs().max()) <= tolerance, float((image - reference).abs().max())
