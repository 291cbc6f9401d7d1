"""One study -> its best series as NIfTI with a sidecar: the job that a batch runs for every study."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataset.atomic import atomic_write
from dataset.pairs_keys import pseudonym
from dataset.volume_io import write_nifti
from errors import InputError, StorageError, one_line
from preprocess.dicom_header import NotDicomError, NotImageError, Slice, read_header
from preprocess.dicom_index import identify
from preprocess.dicom_rules import SeriesRules, objections, preference
from preprocess.dicom_series import Series, read_series
from preprocess.dicom_sidecar import sidecar
from preprocess.dicom_stack import build_stack, without_localizers

_REASONS_SHOWN = 3
# In the reason of a study that was looked through and holds no acceptable series, and in no other
NO_VOLUME = "no series is an acceptable CT volume"


def convert_study(
    *,
    files: Sequence[str],
    output: str,
    name: str,
    key: str,
    rules: dict[str, Any],
    resample_tilt: bool = False,
    all_series: bool = False,
) -> dict[str, Any]:
    """Convert the best acceptable series of a study, or all of them.

    A series that turns out to be no volume (missing slices, damage) gives way to the next best one.

    Args:
        files: of the study, absolute.
        output: folder of the results, which exists.
        name: hash of the study.
        key: file with the key for hashes.
        rules: fields of `SeriesRules`.
        resample_tilt: resample a gantry tilt away instead of refusing the series.
        all_series: write every acceptable series.

    Returns:
        A record: outputs, what was chosen, and each rejected series with its reasons.

    Raises:
        InputError: it holds CT, and none of it is an acceptable volume.
        StorageError: the results cannot be written.
    """
    secret = Path(key).read_bytes().strip()
    choice = SeriesRules(**rules)
    series, damaged, ignored = _by_series(files)
    rejected: list[dict[str, Any]] = []
    candidates: list[tuple[tuple[float, ...], str, list[Slice]]] = []
    for uid, frames in series.items():
        hash_name = pseudonym(secret, "series", uid)
        if not frames:
            rejected.append({"series": hash_name, "slices": 0, "reasons": damaged[uid]})
            continue
        slices, _ = without_localizers(frames)  # the first file may be a scout, which tells nothing of the volume
        reasons = objections(slices, choice) + damaged.get(uid, [])
        if reasons:
            reasons += _geometry_objection(slices, choice)
            rejected.append({"series": hash_name, "slices": len(frames), "reasons": reasons})
        else:
            candidates.append((preference(slices, choice), hash_name, frames))
    chosen: list[dict[str, Any]] = []
    outputs: list[str] = []
    for _, hash_name, frames in sorted(candidates, key=lambda candidate: candidate[:2]):
        if chosen and not all_series:
            reason = ["another series of this study is preferred"]
            rejected.append({"series": hash_name, "slices": len(frames), "reasons": reason})
            continue
        try:
            result = read_series(frames, resample_tilt=resample_tilt, allow_partial=choice.allow_partial)
            _require_thin(result, choice)
        except InputError as error:
            rejected.append({"series": hash_name, "slices": len(frames), "reasons": [str(error)]})
            continue
        patient = pseudonym(secret, "patient", frames[0].patient or frames[0].study_uid)
        names = {"patient": patient, "study": name, "series": hash_name}
        facts, paths = _write(result, names, Path(output))
        chosen.append(facts)
        outputs += paths
    record = {
        "outputs": outputs,
        "chosen": chosen,
        "rejected": sorted(rejected, key=lambda entry: entry["series"]),
        "ignored": dict(ignored),
        "damaged": damaged.get("", []),
    }
    if chosen or not any(frames and frames[0].scan.modality == choice.modality for frames in series.values()):
        return record
    shown = "; ".join(f"series {entry['series']}: {', '.join(entry['reasons'])}" for entry in rejected[:_REASONS_SHOWN])
    more = f" (and {len(rejected) - _REASONS_SHOWN} more)" if len(rejected) > _REASONS_SHOWN else ""
    raise InputError(f"study {name}: {NO_VOLUME}: {shown}{more}")


def _by_series(files: Sequence[str]) -> tuple[dict[str, list[Slice]], dict[str, list[str]], Counter[str]]:
    """Frames by series UID; reasons for damaged files by series UID ("" if unknown); counts of ignored files."""
    series: dict[str, list[Slice]] = {}
    damaged: dict[str, list[str]] = {}
    ignored: Counter[str] = Counter()
    for path in files:
        try:
            for frame in read_header(path):
                series.setdefault(frame.series_uid, []).append(frame)
        except NotDicomError:
            ignored["not DICOM"] += 1
        except NotImageError:
            ignored["DICOM without pixels"] += 1
        except InputError as error:
            try:
                uid = identify(path).series_uid
                series.setdefault(uid, [])
            except (InputError, NotDicomError, NotImageError):
                uid = ""
            damaged.setdefault(uid, []).append(str(error))
    return series, damaged, ignored


def _geometry_objection(frames: list[Slice], rules: SeriesRules) -> list[str]:
    """What else is wrong with a series that the rules refuse: one reading of the report should say it all."""
    if frames[0].scan.modality != rules.modality or len(frames) < 2:
        return []
    try:
        stack = build_stack(frames, lambda one, other: True, allow_partial=rules.allow_partial)
    except InputError as error:
        return [str(error)]
    return [f"the gantry was tilted by {stack.tilt_deg:.1f}°"] if stack.is_tilted else []


def _require_thin(result: Series, rules: SeriesRules) -> None:
    if result.stack.gap_mm > rules.max_thickness_mm * 1.01:
        raise InputError(f"slices are {result.stack.gap_mm:.2f} mm apart, more than {rules.max_thickness_mm:g} mm")


def _write(result: Series, names: dict[str, str], folder: Path) -> tuple[dict[str, Any], list[str]]:
    stem = folder / f"{names['patient']}_{names['series']}"
    volume_path, json_path = Path(f"{stem}.nii.gz"), Path(f"{stem}.json")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise StorageError(
            one_line(f"{folder}: cannot be created ({error.strerror}): choose another --output")
        ) from error
    facts = sidecar(result, names)
    # the sidecar first: a volume that a kill left without one would count as a patient of its own
    with atomic_write(json_path) as handle:
        handle.write(json.dumps(facts, indent=1, sort_keys=True).encode() + b"\n")
    write_nifti(volume_path, result.volume)
    return facts, [str(volume_path), str(json_path)]
