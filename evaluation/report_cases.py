"""The held-out patients that a report shows: volumes and radiographs of one patient at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf.errors import OmegaConfBaseException

from dataset.geometry import spacing_mm
from dataset.intensity import HUWindow
from dataset.volume_io import read_nifti
from errors import InputError, one_line
from evaluation.metrics.anatomy import body_mask
from evaluation.metrics.generation import volume_scores
from evaluation.report_collect import Found, Result, TrainingRun, mapping, number

_MOST_STEPS = 1000  # of a sampler; an evaluation that says more is damaged
RECONSTRUCTION, GENERATED = "codec's reconstruction", "generated from the X-ray"


@dataclass(frozen=True)
class ReportCase:
    """One patient.

    Attributes:
        name: of the case.
        truth_hu: (D, H, W) HU, clipped to the window as the models see it.
        affine: (4, 4), index (d, h, w, 1) -> RAS+ mm.
        window: HU window of the models.
        volumes: by role, `RECONSTRUCTION` and `GENERATED`, float HU on the same grid.
        xrays: (view, picture (S, S) in [0, 1]).
    """

    name: str
    truth_hu: np.ndarray
    affine: np.ndarray
    window: HUWindow
    volumes: Mapping[str, np.ndarray]
    xrays: tuple[tuple[str, np.ndarray], ...] = ()

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel spacing (d, h, w)."""
        return spacing_mm(self.affine)

    def scores(self) -> dict[str, dict[str, float]]:
        """`evaluation.metrics.generation.volume_scores` of each volume."""
        body = body_mask(self.truth_hu, self.affine)
        return {
            role: volume_scores(volume, self.truth_hu, body, self.affine, self.window)
            for role, volume in self.volumes.items()
        }


@dataclass
class Chosen:
    """How the cases were made, for the text of the page; filled while they are drawn.

    Attributes:
        sentence: where they come from.
        left_out: names of patients that could not be read.
    """

    sentence: str = ""
    left_out: list[str] = field(default_factory=list)


def cases_of(found: Found, count: int, device: str, chosen: Chosen) -> Iterator[ReportCase]:
    """The first held-out patients of the diffusion run, else of the codec's; one in memory at a time.

    Args:
        found: in the folder.
        count: at most so many.
        device: where to sample.
        chosen: is filled.

    Raises:
        InputError: checkpoints or data of the run cannot be read.
    """
    evaluated = [_settings(result).get("model") for result in found.results.get("generation", ())]
    trained = [run for run in found.of_kind("diffusion") if run.final.is_file()]
    if len(trained) > 1:  # the one that was evaluated, if any
        trained = sorted(trained, key=lambda run: _digest(run.final) not in evaluated)
    try:
        if trained:
            yield from _diffusion_cases(trained[0], found.results.get("generation", []), count, device, chosen)
            return
        for run in found.of_kind("codec"):
            if (run.folder / "sample_reconstructions").is_dir():
                yield from _codec_cases(run, count, chosen)
                return
    except OmegaConfBaseException as error:
        raise InputError(f"config.yaml of the run: {one_line(error)}: it is damaged") from error


def _diffusion_cases(
    run: TrainingRun, results: list[Result], count: int, device: str, chosen: Chosen
) -> Iterator[ReportCase]:
    from evaluation.held_out import Sampling, open_run  # imports Lightning, as the data below

    digest = _digest(run.final)
    drawn = [_settings(result) for result in results if _settings(result).get("model") == digest]
    sampling = Sampling(**_sampling(drawn[-1])) if drawn else Sampling()
    test = bool(drawn) and drawn[-1].get("split") == "test"
    held_out = open_run(run.folder, None, None, count, device, "test" if test else "validation")
    chosen.sentence = (
        f"The first {'test' if test else 'held-out'} patients of the run {run.name}, in the order of the split and not "
        "picked by result. "
        f"Generated in {sampling.steps} steps of {sampling.sampler}, guidance {sampling.guidance:g}, "
        f"seed {sampling.seed}; the model is told the X-ray alone."
    )
    generator, dataset = held_out.generator, held_out.cases
    window = generator.codec.window
    for index in range(len(dataset)):
        name = dataset.cases[index].name
        sample = dataset[index]
        if sample["skipped"]:
            chosen.left_out.append(name)
            continue
        shape = tuple(sample["hu"].shape[1:])
        d, h, w = shape
        generated = sampling.draw(generator, held_out.conditions(sample), shape, index)[0, 0]
        code = sample["code"][None].to(generator.device)
        decoded = generator.codec.decode(code)[0, 0, :d, :h, :w].cpu().numpy()
        shown = zip(dataset.settings.views, sample["xray"].numpy()[:, 0], sample["xray_present"].tolist(), strict=True)
        yield ReportCase(
            name,
            window.to_hu(window.to_unit(sample["hu"][0].numpy())),
            sample["affine"].numpy(),
            window,
            {RECONSTRUCTION: decoded, GENERATED: generated},
            tuple((view, picture) for view, picture, present in shown if present),
        )


def _codec_cases(run: TrainingRun, count: int, chosen: Chosen) -> Iterator[ReportCase]:
    """Truth from the run's data, reconstructions from the files of ``evaluation/reconstruct.py``."""
    from dataset.from_config import data_module

    data = data_module(run.config)
    data.build(0, 1)
    window = HUWindow(float(run.config.dataset.hu_min), float(run.config.dataset.hu_max))
    chosen.sentence = f"The first held-out patients of the run {run.name}, in the order of the split."
    for volume in data.datasets["validation"].volumes[:count]:
        path: Path = run.folder / "sample_reconstructions" / f"{volume.name}.nii.gz"
        try:
            if not path.is_file():
                raise InputError(f"{path}: not there")
            truth, reconstruction = np.asarray(volume.open()), read_nifti(path).hu
            if truth.shape != reconstruction.shape:
                raise InputError(f"{path}: another grid than the truth")
        except InputError:
            chosen.left_out.append(volume.name)
            continue
        shown = window.to_hu(window.to_unit(truth))
        yield ReportCase(volume.name, shown, volume.affine, window, {RECONSTRUCTION: reconstruction.astype(np.float32)})


def _settings(result: Result) -> dict[str, Any]:
    return mapping(result.content, "settings")


def _sampling(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an evaluation as arguments of `Sampling`, so that the pictures are of the volumes it scored.

    Empty, which means the defaults, where they make no sense.
    """
    sampler = settings.get("sampler")
    figures = {key: number(settings.get(key)) for key in ("steps", "guidance", "rescale", "seed")}
    sensible = all(0 <= value < 1e9 for value in figures.values()) and figures["steps"] <= _MOST_STEPS
    if not sensible or not isinstance(sampler, str):
        return {}
    return {"sampler": sampler} | figures | {key: int(figures[key]) for key in ("steps", "seed")}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> str:
    """Of the libraries that made the numbers."""
    return f"torch {torch.__version__}, numpy {np.__version__}"
