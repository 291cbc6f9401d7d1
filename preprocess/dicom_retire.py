"""Volumes of an earlier conversion that the present one would not write are taken away: they would go into training.

A better series, stricter rules or another PatientID give a study another volume under another name; the older one would
stay beside it, as a second volume of the patient or as a patient of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dataset.pairs_keys import pseudonym
from errors import StorageError
from preprocess.batch import BatchResult
from preprocess.dicom_study import NO_VOLUME

# PATIENT_SERIES, twelve hex digits each, as `convert_study` names volumes and sidecars: nothing else is ever touched
_OUTPUT = re.compile(r"[0-9a-f]{12}_([0-9a-f]{12})\.(?:nii\.gz|json)")
_SIDECAR_BYTES = 1 << 20


@dataclass(frozen=True)
class Retired:
    """What became of the files that the report does not list.

    Attributes:
        removed: volumes that were removed; a lone sidecar does not count.
        doubtful: names of volumes that were left, sorted: they belong to a study of this run, or to nobody knows which,
            but whether they are out of date cannot be told.
    """

    removed: int
    doubtful: tuple[str, ...]


def retire(output: Path, result: BatchResult, series: Mapping[str, Iterable[str]], key: bytes) -> Retired:
    """Remove what earlier runs wrote of the series of this run and this run did not choose.

    Only a series that this run has seen and decided against is out of date for certain. Those of other inputs stay, as
    do those of a study that failed for another reason than that it has no acceptable volume.

    Args:
        output: folder of the results.
        result: of a batch that ended.
        series: SeriesInstanceUIDs of the input by job name.
        key: of the hashed names.

    Raises:
        StorageError: a file cannot be removed.
    """
    listed = {Path(path).name for record in result.records.values() for path in record["outputs"]}
    decided = {name for name, reason in result.failures.items() if NO_VOLUME in reason} | result.records.keys()
    against = {pseudonym(key, "series", uid) for name in decided for uid in series.get(name, ())}
    studies = result.records.keys() | result.failures.keys()
    removed, doubtful = 0, []
    # volumes before sidecars: a kill in between must not leave a volume that names no patient
    for path in sorted(output.iterdir(), key=lambda file: (file.suffix == ".json", file.name)):
        match = _OUTPUT.fullmatch(path.name)
        if match is None or path.name in listed or not path.is_file():
            continue
        is_volume = path.suffix != ".json"
        if match[1] in against:
            _remove(path)
            removed += is_volume
        elif is_volume and _study_of(path) in (None, *studies):
            doubtful.append(path.name)
    return Retired(removed, tuple(doubtful))


def _study_of(volume: Path) -> str | None:
    """The study that the sidecar names, None where it names none."""
    try:
        with open(volume.with_name(volume.name.removesuffix(".nii.gz") + ".json"), "rb") as handle:
            study = json.loads(handle.read(_SIDECAR_BYTES))["study"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return study if isinstance(study, str) else None


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        raise StorageError(
            f"{path}: out of date and cannot be removed ({error.strerror}): remove it, or it goes into training"
        ) from error
