"""Volumes for many radiographs, into a folder that an interrupted run can go on in."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dataset.atomic import atomic_write, make_folder
from dataset.xray import load_xray
from ddpm.bundle import Bundle
from ddpm.ctpa_volume import CTPAVolume, nifti_names
from ddpm.inference import Request, default_batch, draw, provenance_of, settings_facts, volume_of
from ddpm.patient import Patient, prepare_patient, refuse_untrained
from ddpm.xray_files import XRayFiles
from errors import ConfigurationError, InputError, StorageError

_RECORD = ".provenance.json"


@dataclass(frozen=True)
class Results:
    """A folder of results.

    For each radiograph ``NAME.nii.gz`` and what `CTPAVolume.save_nifti` adds to it, as asked ``NAME_panel.png`` and
    ``NAME_dicom/``, and ``NAME.provenance.json``: how the volume came about, and the checksum of each file. That record
    stands there before the first file, without checksums, and is completed after the last.

    Attributes:
        folder: of all results.
        png: write panels.
        dicom: write DICOM series.
        overwrite: replace results of other settings or radiographs; else they are refused.
    """

    folder: Path
    png: bool = False
    dicom: bool = False
    overwrite: bool = False

    def refuse_other_settings(self, jobs: Sequence[XRayFiles], settings: dict[str, Any]) -> None:
        """Before anything is drawn: results of another bundle, seed and so on are not mixed with ours.

        Raises:
            ConfigurationError: the folder holds such, or two radiographs would share a file.
        """
        owner: dict[Path, str] = {}
        for job in jobs:
            for path in self._planned(job.name, settings["samples"]):
                if owner.setdefault(path, job.name) != job.name:
                    raise ConfigurationError(f"{path.name}: of {owner[path]} and of {job.name}: rename one radiograph")
            if self.overwrite:
                continue
            record = self._read(job.name)
            if record is None:
                if (own := self.folder / f"{job.name}.nii.gz").exists():
                    raise ConfigurationError(f"{own}: not made by this command: give another --output, or --overwrite")
                continue
            if differing := _differing(record["provenance"], settings, settings):
                raise ConfigurationError(
                    f"{self.folder}: holds {job.name} of another {differing}: give another --output, or --overwrite"
                )

    def is_finished(self, name: str, provenance: dict[str, Any]) -> bool:
        """Whether this very result is there, whole.

        Raises:
            InputError: a result of another radiograph has that name.
        """
        record = self._read(name)
        if record is None:
            return False
        if record["provenance"] != provenance:
            if self.overwrite:
                return False
            differing = _differing(record["provenance"], provenance, record["provenance"] | provenance)
            raise InputError(
                f"{self.folder / name}.nii.gz is of another {differing}: give another --output, or --overwrite"
            )
        files = record["files"] or {}
        planned = {path.relative_to(self.folder).as_posix() for path in self._planned(name, provenance["samples"])}
        has_series = not self.dicom or any(entry.startswith(f"{name}_dicom/") for entry in files)
        wanted = {entry for entry in planned if not entry.endswith("_dicom")}
        return has_series and wanted <= files.keys() and all(_sha256(self.folder / e) == s for e, s in files.items())

    def save(self, name: str, volume: CTPAVolume) -> Path:
        """Write what is asked for; returns the main file.

        Raises:
            StorageError: the disk refuses.
        """
        self._remove_old(name, volume.provenance)
        self._write(name, volume.provenance, None)
        main = self.folder / f"{name}.nii.gz"
        written = list(volume.save_nifti(main))
        if self.png:
            written.append(self.folder / f"{name}_panel.png")
            volume.save_png(written[-1])
        if self.dicom:
            written += volume.save_dicom(self.folder / f"{name}_dicom")
        sums = {path.relative_to(self.folder).as_posix(): _sha256(path) for path in written}
        self._write(name, volume.provenance, sums)
        return main

    def _remove_old(self, name: str, provenance: dict[str, Any]) -> None:
        """What an overwritten result leaves behind, such as a further sample, would pass for part of the new one.

        By name and not by its record, which lists nothing where that run was interrupted.

        Raises:
            StorageError: a file cannot be removed.
        """
        record = self._read(name)
        if record is None or record["provenance"] == provenance:
            return
        parts = (".nii.gz", "_mean.nii.gz", "_uncertainty.nii.gz", "_sample_*.nii.gz", "_panel.png", "_dicom/IM*.dcm")
        for path in sorted(path for part in parts for path in self.folder.glob(name + part)):
            stem = path.name.removesuffix(".nii.gz")
            if stem != name and (self.folder / (stem + _RECORD)).exists():
                continue  # the result of a radiograph of that name
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise StorageError(f"{path}: of an older result, cannot be removed ({error.strerror})") from error

    def _planned(self, name: str, samples: int) -> list[Path]:
        paths = nifti_names(self.folder / f"{name}.nii.gz", samples)
        paths += [self.folder / f"{name}_panel.png"] if self.png else []
        return paths + ([self.folder / f"{name}_dicom"] if self.dicom else [])

    def _read(self, name: str) -> dict[str, Any] | None:
        """The record of a result; a damaged one counts as none."""
        try:
            record = json.loads((self.folder / (name + _RECORD)).read_text(encoding="utf-8"))
            return record if isinstance(record["provenance"], dict) and "files" in record else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def _write(self, name: str, provenance: dict[str, Any], files: dict[str, str] | None) -> None:
        text = json.dumps({"provenance": provenance, "files": files}, indent=1, sort_keys=True)
        with atomic_write(self.folder / (name + _RECORD)) as handle:
            handle.write((text + "\n").encode())


def run(
    bundle: Bundle,
    request: Request,
    jobs: Sequence[XRayFiles],
    results: Results,
    *,
    label: int | None = None,
    batch: int | None = None,
) -> tuple[int, dict[str, str]]:
    """Draw and save the volumes of all radiographs that are not there yet; a bad radiograph never stops the rest.

    Args:
        bundle: on the device that computes.
        request: how.
        jobs: the radiographs.
        results: where to.
        label: of all patients, for a model that was trained with labels; see `ddpm.patient.prepare_patient`.
        batch: samples that are drawn together; None as `ddpm.inference.draw` has it.

    Returns:
        How many results are there now, and a reason for each radiograph that was left out, by name.

    Raises:
        ConfigurationError: the folder holds results of other settings, or the model takes no text, label or lateral
            view. Nothing was drawn then.
        StorageError: the disk refuses. MemoryExhaustedError: one volume is too much.
    """
    refuse_untrained(bundle, text=any(job.report is not None for job in jobs), label=label)
    if "lateral" not in bundle.config.conditioner.views and any(len(job.paths) > 1 for job in jobs):
        raise ConfigurationError("a lateral view is given, but this model was trained without: leave it out")
    make_folder(results.folder)
    results.refuse_other_settings(jobs, settings_facts(bundle, request))
    finished, failed = 0, dict[str, str]()
    batch = batch or default_batch(bundle, request)
    together = max(1, batch // request.samples)
    bar = tqdm(total=len(jobs), unit="X-ray", desc="X-ray to volume", disable=None)
    with bar:
        for first in range(0, len(jobs), together):
            waiting: list[tuple[XRayFiles, Patient]] = []
            for job in jobs[first : first + together]:
                try:
                    xrays = [load_xray(path.absolute()) for path in job.paths]
                    patient = prepare_patient(bundle, xrays, job.text(), label)
                    if results.is_finished(job.name, provenance_of(bundle, request, patient)):
                        finished += 1
                        bar.update()
                        bar.write(f"{job.name}: there already")
                    else:
                        waiting.append((job, patient))
                except InputError as error:
                    failed[job.name] = str(error)
                    bar.update()
            passes = 0

            def tick() -> None:
                nonlocal passes
                passes += 1
                bar.set_postfix_str(f"network pass {passes}")

            begin = time.perf_counter()
            drawn = draw(bundle, [patient for _, patient in waiting], request, batch=batch, on_step=tick)
            for (job, patient), hu in zip(waiting, drawn, strict=True):
                try:
                    path = results.save(job.name, volume_of(bundle, request, patient, hu))
                    finished += 1
                    bar.write(f"{job.name}: {time.perf_counter() - begin:.1f} s, {path}")
                except InputError as error:
                    failed[job.name] = str(error)
                bar.update()
                begin = time.perf_counter()
    return finished, failed


def _differing(theirs: dict[str, Any], ours: dict[str, Any], keys: dict[str, Any]) -> str:
    return ", ".join(key for key in keys if theirs.get(key) != ours.get(key))


def _sha256(path: Path) -> str:
    """Of a file's content; "" for one that cannot be read."""
    try:
        with open(path, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError:
        return ""
