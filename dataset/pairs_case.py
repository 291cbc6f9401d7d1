"""One CT examination with what belongs to it: X-rays, label, report, split."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dataset.verification import STORE_SUFFIX, VOLUME_SUFFIXES
from dataset.volume_io import Volume, read_nifti
from errors import InputError, one_line

log = logging.getLogger(__name__)
# What `preprocess/dicom_to_nifti.py` writes into its sidecars, so that no other program's JSON is taken for one.
SIDECAR_FORMAT = 1
# A sidecar holds a dozen fields; what is larger is something else.
_MAX_SIDECAR_BYTES = 1 << 20
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class CTCase:
    """A CT volume of a cohort; a `dataset.sources.VolumeSource`.

    Attributes:
        name: unique in its cohort and safe as a file name.
        patient: whose volume it is; splits go by it.
        ct: .nii, .nii.gz or a .b2nd store.
        xrays: radiographs of the same patient; empty: rendered from the CT on demand. Files that tell no view are
            frontal.
        label: pulmonary embolism; None where nobody said.
        report: text of the radiologist's report.
        split: "train", "validation" or "test"; None before splits are assigned.
        laterals: lateral views, beside those in ``xrays`` that say so themselves.
    """

    name: str
    patient: str
    ct: Path
    xrays: tuple[Path, ...] = ()
    label: bool | None = None
    report: str | None = None
    split: str | None = None
    laterals: tuple[Path, ...] = ()

    @property
    def needs_drr(self) -> bool:
        """Whether there is no radiograph, so that one has to be rendered from the CT."""
        return not self.xrays

    @property
    def store(self) -> Path | None:
        """The volume's store, if it is one: it is read where it lies."""
        return self.ct if is_store(self.ct) else None

    @property
    def identity(self) -> str:
        """Path, size and time of change: a file that was replaced is prepared again.

        Raises:
            InputError: the file is gone.
        """
        try:
            status = self.ct.stat()
        except OSError as error:
            raise InputError(f"{self.ct}: cannot be read ({error.strerror}): was it moved?") from error
        return f"{self.ct.resolve()} {status.st_size} {status.st_mtime_ns}"

    def load(self) -> Volume:
        """Read the whole volume, int16 HU (D, H, W), on its own grid.

        Raises:
            InputError: it cannot be read.
        """
        return load_volume(self.ct)


def load_volume(path: Path) -> Volume:
    """Read a NIfTI file or a store whole: int16 HU (D, H, W) on the standard axes.

    Raises:
        InputError: it cannot be read, or a store's voxels do not fit their checksum; the message names the path.
    """
    if not is_store(path):
        return read_nifti(path)
    from dataset.store import verify_store  # blosc2, which NIfTI cohorts need not load

    stored = verify_store(path)
    return Volume(np.asarray(stored.hu), stored.affine, str(path))


def is_store(path: Path) -> bool:
    """Whether the name says that this is a store of the native grid."""
    return path.name.lower().endswith(STORE_SUFFIX)


def volume_stem(path: Path) -> str:
    """File name without .nii, .nii.gz or .b2nd."""
    for suffix in sorted(VOLUME_SUFFIXES, key=len, reverse=True):
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.name


def named_patient(volume: Path) -> str | None:
    """The patient that our sidecar of a volume names; None without one, or with another program's.

    A store that cannot be opened names nobody: its voxels are never read, whichever side it is on.

    Raises:
        InputError: the sidecar is damaged: on which side of a split the volume belongs cannot be known.
    """
    try:
        inside = _inside(volume)
    except InputError:
        return None
    sidecar = inside or _beside(volume)
    named = sidecar.get("patient")
    return named if sidecar.get("format") == SIDECAR_FORMAT and isinstance(named, str) and named else None


def warn_of_nameless(root: str, named: Sequence[str | None]) -> None:
    """One line in the log where volumes name no patient, since two of one patient may land on two sides of a split."""
    if without := sum(patient is None for patient in named):
        log.warning("%s: %d of %d volumes without a sidecar, each counts as a patient", root, without, len(named))


def sidecar_path(volume: Path) -> Path:
    """Where the JSON sidecar of a volume lies: beside it, under its stem."""
    return volume.with_name(volume_stem(volume) + ".json")


def read_sidecar(volume: Path) -> dict[str, Any]:
    """What is known of the acquisition of a volume; {} where nobody wrote it down.

    A store carries it inside, as ``sidecar``; a JSON file beside the volume is read where there is none.

    Raises:
        InputError: the sidecar is damaged.
    """
    return _inside(volume) or _beside(volume)


def _inside(volume: Path) -> dict[str, Any]:
    if not is_store(volume):
        return {}
    from dataset.store import open_store

    return dict(open_store(volume).metadata.get("sidecar") or {})


def _beside(volume: Path) -> dict[str, Any]:
    path = sidecar_path(volume)
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > _MAX_SIDECAR_BYTES:
            raise ValueError("larger than 1 MiB")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        reason = f"no usable sidecar ({one_line(error)}): convert the series again, or remove it"
        raise InputError(f"{path}: {reason}") from error
    return content


def case_name(patient: str, ct: Path) -> str:
    """A name for the files made of a CT: patient and stem, nothing that could leave a folder."""
    stem, patient = (_UNSAFE.sub("_", text) for text in (volume_stem(ct), patient))
    # 160 of the 255 bytes of a file name: prepared volumes add a hash and a suffix
    return (stem if stem.startswith(patient) else f"{patient}_{stem}")[:160].lstrip(".") or "case"


def with_unique_names(cases: Iterable[CTCase]) -> list[CTCase]:
    """Give cases that share a name one that also depends on their paths."""
    cases = list(cases)
    twice = {name for name, count in Counter(case.name for case in cases).items() if count > 1}
    return [
        replace(case, name=f"{case.name}-{hashlib.sha256(str(case.ct).encode()).hexdigest()[:8]}")
        if case.name in twice
        else case
        for case in cases
    ]
