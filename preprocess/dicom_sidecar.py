"""The JSON beside a volume: a white list of technical facts, no text that anybody typed in.

Manufacturers come from a list, kernels are short technical tokens, the contrast agent is yes, no or null (the header
does not say); patient, study and series are keyed hashes.
"""

from __future__ import annotations

import re
from typing import Any

from pydicom.uid import UID

from dataset.pairs_case import SIDECAR_FORMAT
from preprocess.dicom_elements import token
from preprocess.dicom_rules import has_contrast
from preprocess.dicom_series import Series

# Every field that `sidecar` writes: nothing else is taken over from a file of this format.
FIELDS = frozenset({
    "format", "patient", "study", "series", "modality", "shape_dhw", "spacing_dhw_mm", "affine_ras_mm", "rows",
    "columns", "slice_thickness_mm", "slice_gap_mm", "largest_slice_offset_mm", "kvp", "kernel", "manufacturer",
    "contrast", "image_type", "transfer_syntax", "lossy", "tilt_resampled_deg", "slices", "duplicates_dropped",
    "localizers_dropped", "voxels_padded", "voxels_rounded", "voxels_clipped", "voxels_padding_in_tissue_kept", "notes",
})  # fmt: skip
NO_PATIENT_NOTE = "no PatientID in the header: this study counts as a patient of its own"
# a word of the header -> the name that is shown
_MANUFACTURERS = {
    "ge ": "GE", "ge healthcare": "GE", "siemens": "Siemens", "philips": "Philips", "toshiba": "Toshiba",
    "canon": "Canon", "hitachi": "Hitachi", "fujifilm": "Fujifilm", "neusoft": "Neusoft",
    "united imaging": "United Imaging", "uih": "United Imaging", "picker": "Picker", "marconi": "Marconi",
    "elscint": "Elscint", "neurologica": "NeuroLogica", "xray2ctpa": "XRay2CTPA phantom",
}  # fmt: skip
# B31f, Br40d, I70f\3, FC08-H, STANDARD, LUNG, YA, iDose-free names; never a sentence
_KERNEL = re.compile(r"^(?:[A-Z]{1,3}[a-z]{0,2}\d{1,3}[A-Za-z]{0,3}(?:[-\\/]?[A-Z0-9]{1,2})?|[A-Z]{1,2}|IMR\d)$")
_KERNEL_WORDS = {
    "STANDARD", "STND", "STD", "STD+", "SOFT", "DETAIL", "BONE", "BONEPLUS", "LUNG", "CHST", "CHEST", "EDGE", "ULTRA",
    "SMOOTH", "SHARP", "BODY", "HEAD",
}  # fmt: skip


def manufacturer(text: str) -> str:
    """A known maker of scanners, or "other"; empty where the header has none."""
    lower = text.lower() + " "
    return next((name for word, name in _MANUFACTURERS.items() if word in lower), "other" if text.strip() else "")


def kernel(text: str) -> str:
    """The name of a reconstruction kernel, or "other" if it does not look like one."""
    name = token(text.split("\\")[0], 16)
    return name if not name or _KERNEL.match(name) or name.upper() in _KERNEL_WORDS else "other"


def sidecar(series: Series, names: dict[str, str]) -> dict[str, Any]:
    """Everything that leaves with a volume.

    Args:
        series: what was read.
        names: hashes of patient, study and series.

    Returns:
        JSON-able; lengths in mm, sizes in the order (D, H, W) of the project.
    """
    stack, counts, volume = series.stack, series.counts, series.volume
    first = stack.slices[0]
    scan = first.scan
    kinds = ("ORIGINAL", "DERIVED", "PRIMARY", "SECONDARY", "AXIAL", "VOLUME", "REFORMATTED")
    return {
        "format": SIDECAR_FORMAT,
        **names,
        "modality": token(scan.modality, 4),
        "shape_dhw": list(volume.hu.shape),
        "spacing_dhw_mm": [round(mm, 6) for mm in volume.spacing_mm],
        "affine_ras_mm": volume.affine.tolist(),
        "rows": first.pixels.rows,
        "columns": first.pixels.columns,
        "slice_thickness_mm": first.thickness_mm,
        "slice_gap_mm": round(stack.gap_mm, 6),
        "largest_slice_offset_mm": round(stack.off_grid_mm, 4),
        "kvp": scan.kvp,
        "kernel": kernel(scan.kernel),
        "manufacturer": manufacturer(scan.manufacturer),
        "contrast": has_contrast(first),
        "image_type": [kind for kind in first.image_type if kind in kinds],
        "transfer_syntax": token(UID(first.pixels.syntax).name, 64),
        "lossy": scan.lossy,
        "tilt_resampled_deg": round(series.tilt_resampled_deg, 3),
        "slices": len(stack.slices),
        "duplicates_dropped": stack.duplicates,
        "localizers_dropped": series.localizers,
        "voxels_padded": counts.padded,
        "voxels_rounded": counts.rounded,
        "voxels_clipped": counts.clipped,
        "voxels_padding_in_tissue_kept": counts.tissue_padding,
        "notes": [*stack.notes, *([] if first.patient else [NO_PATIENT_NOTE])],
    }
