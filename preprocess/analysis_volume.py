"""What the analysis of a data set keeps of one volume: geometry, HU, acquisition, contrast, and what looks wrong."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from dataset.pairs_case import load_volume, read_sidecar
from preprocess import dicom_stack
from preprocess.analysis_contrast import ANGIOGRAPHIC_HU, NONE, UNKNOWN, WEAK, central_contrast
from preprocess.dicom_sidecar import NO_PATIENT_NOTE

# Edges of the HU histogram; the first and the last bin also count what lies beyond.
HISTOGRAM_EDGES_HU = list(range(-1100, 2001, 25))
THICK_SLICES_MM = 3.0
_PADDING_HU = -1500
_AIR_HU = -500
# Fields of a sidecar that are taken over, and how: nothing else of it reaches a page.
_NUMBERS = ("kvp", "slice_thickness_mm")
_WORDS = ("manufacturer", "kernel")
_WORD = re.compile(r"[^A-Za-z0-9 ._+\\/-]+")
_WORD_LENGTH = 32
# Notes of `dicom_to_nifti` that become flags, by what they contain: their other text is not taken over either.
_NOTES = (dicom_stack.ENDS_MISSING, dicom_stack.END_DOUBTFUL, dicom_stack.THINNED, NO_PATIENT_NOTE)


def analyse_volume(volume: str, sidecar: str | None) -> dict[str, Any]:
    """Measure one volume.

    Args:
        volume: NIfTI file or store.
        sidecar: the JSON beside it, if any; naming it lets `--resume` notice that it changed.

    Returns:
        A JSON-able record; lengths in mm, arrays in the order (D, H, W), shares of all voxels.

    Raises:
        InputError: the volume or its sidecar is damaged.
    """
    path = Path(volume)
    facts = read_sidecar(path)
    acquisition = acquisition_of(facts)
    loaded = load_volume(path)
    hu, spacing = loaded.hu, loaded.spacing_mm
    histogram = _histogram(hu)
    contrast = central_contrast(hu, spacing)
    record: dict[str, Any] = {
        "shape_dhw": [int(size) for size in hu.shape],
        "spacing_dhw_mm": [round(mm, 4) for mm in spacing],
        "extent_dhw_mm": [round(mm * size, 1) for mm, size in zip(spacing, hu.shape, strict=True)],
        "hu_min": int(hu.min()),
        "hu_max": int(hu.max()),
        "hu_histogram": [round(float(share), 6) for share in histogram],
        "share_padding": round(float(np.count_nonzero(hu < _PADDING_HU)) / hu.size, 6),
        "share_air": round(float(histogram[: HISTOGRAM_EDGES_HU.index(_AIR_HU)].sum()), 6),
        "sidecar": sidecar is not None or any(value is not None for value in acquisition.values()),
        **acquisition,
        "contrast_phase": contrast.phase,
        "blood_hu": None if contrast.blood_hu is None else round(contrast.blood_hu, 1),
        "blood_core_ml": round(contrast.core_ml, 1),
        "outputs": [],
    }
    record["flags"] = _flags(record) + notes_of(facts)
    return record


def notes_of(sidecar: dict[str, Any]) -> list[str]:
    """What the conversion found doubtful, as flags: the known notes of a sidecar, without their figures."""
    notes = sidecar.get("notes")
    written = [note for note in notes if isinstance(note, str)] if isinstance(notes, list) else []
    return [known for known in _NOTES if any(known in note for note in written)]


def acquisition_of(sidecar: dict[str, Any]) -> dict[str, Any]:
    """The white-listed fields of a sidecar; None for what it does not say or says in another form."""
    taken: dict[str, Any] = {}
    for key in _NUMBERS:
        value = sidecar.get(key)
        taken[key] = None
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0:
            taken[key] = round(float(value), 3)
    for key in _WORDS:
        value = sidecar.get(key)
        word = _WORD.sub("", value)[:_WORD_LENGTH].strip() if isinstance(value, str) else ""
        taken[key] = word or None
    noted = sidecar.get("contrast")
    taken["contrast_noted"] = noted if isinstance(noted, bool) else None
    return taken


def _histogram(hu: np.ndarray) -> np.ndarray:
    """Share of voxels in each bin, float64; slice by slice, because a float copy of the volume would be large."""
    low, high = HISTOGRAM_EDGES_HU[0], HISTOGRAM_EDGES_HU[-1]
    width = HISTOGRAM_EDGES_HU[1] - low
    counts = np.zeros(len(HISTOGRAM_EDGES_HU) - 1, dtype=np.int64)
    for plane in hu:
        bins = (np.clip(plane, low, high - 1).astype(np.int32) - low) // width
        counts += np.bincount(bins.ravel(), minlength=counts.size)
    return np.asarray(counts / hu.size)


def _flags(record: dict[str, Any]) -> list[str]:
    """What a person should look at before training on this volume."""
    flags = []
    phase, noted = record["contrast_phase"], record["contrast_noted"]
    if phase == NONE:
        flags.append("no contrast")
    elif phase == WEAK:
        flags.append(f"weak contrast (below {ANGIOGRAPHIC_HU:.0f} HU)")
    elif phase == UNKNOWN:
        flags.append("contrast not measurable: no mediastinum found")
    if noted is True and phase == NONE:
        flags.append("header notes contrast, blood has none")
    elif noted is False and phase not in (NONE, UNKNOWN):
        flags.append("header notes no contrast, blood has it")
    if record["share_air"] == 0:
        flags.append("no voxel below -500 HU: not in HU, or no chest")
    if record["share_padding"] > 0:
        flags.append("padding below -1500 HU")
    depth_mm = record["spacing_dhw_mm"][0]
    if max(depth_mm, record["slice_thickness_mm"] or 0.0) > THICK_SLICES_MM:
        flags.append(f"slices thicker or further apart than {THICK_SLICES_MM:.0f} mm")
    return flags
