"""What the scripts of this project left in a folder: training runs with their curves, and results of evaluations.

A folder may be one run, one evaluation, or hold several of them (``codec/``, ``ddpm/``, ``evaluation/``). What is not
there is simply absent; what is there and damaged is named, and the rest is reported.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from errors import InputError, one_line

# Far more than the scripts write; what is larger is something else.
_MAX_BYTES = 64 << 20
_MAX_ROWS = 200_000
_LARGEST = 1e30
_DEPTH = 3
# Folders of a run that hold no other run, and may hold thousands of files.
_PASSED_BY = {"checkpoints", "tensorboard_logs", "validation_results", "cases", "logs", "cache"}
# File name, the object inside by which its content is recognised, name of the part.
_PARTS = (
    ("metrics.json", ("mean",), "codec_metrics"),
    ("report.json", ("summary", "scores"), "generation"),
    ("report.json", ("summary", "auroc"), "clinical"),
    ("lesion_survival.json", ("survival",), "lesions"),
    ("sampler_table.json", ("verdicts",), "samplers"),
    ("samplers.json", ("verdicts",), "samplers"),
)


@dataclass(frozen=True)
class Curves:
    """A CSV log: for each column its points (step, value), those without a sensible number left out."""

    columns: dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class TrainingRun:
    """An ``output_dir`` of a training script.

    Attributes:
        name: of the folder, relative to the one that was given.
        kind: "codec", "diffusion" or "classifier".
        folder: where it lies.
        config: as it was recorded.
        curves: by log, "train" and "validation".
    """

    name: str
    kind: str
    folder: Path
    config: DictConfig
    curves: dict[str, Curves]

    @property
    def final(self) -> Path:
        """Checkpoint of a training that went to its end."""
        return self.folder / "checkpoints" / "final.ckpt"


@dataclass(frozen=True)
class Result:
    """A JSON that an evaluation left: the folder's name relative to the one that was given, and the content."""

    name: str
    folder: Path
    content: dict[str, Any]


@dataclass
class Found:
    """Everything in a folder, in the order of names; ``damaged`` says in one line each what had to be left out."""

    runs: list[TrainingRun] = field(default_factory=list)
    results: dict[str, list[Result]] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)

    def of_kind(self, kind: str) -> list[TrainingRun]:
        """Training runs of one kind."""
        return [run for run in self.runs if run.kind == kind]


def collect(folders: Iterable[Path]) -> Found:
    """Look through folders and those below them.

    Args:
        folders: as given on the command line; of an evaluation inside a run, the run is found as well.

    Returns:
        What was recognised. Messages name files relative to the folder.

    Raises:
        InputError: a folder is missing, or nothing in any of them is of this project.
    """
    found = Found()
    seen: set[Path] = set()
    folders = list(folders)
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder: --run wants the output folder of a training or an evaluation")
        top = folder.parent if _is_result_of_run(folder) else folder
        for place in _walk(top, _DEPTH):
            if (real := place.resolve()) not in seen:
                seen.add(real)
                _look(place, _name(place, top), found)
    if not (found.runs or found.results or found.damaged):
        raise InputError(
            f"{folders[0]}: holds no training run and no results: give the output_dir of a training, "
            "the --output of an evaluation, or a folder of them"
        )
    return found


def number(value: Any) -> float:
    """A JSON value as float; NaN for null and whatever is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def mapping(value: Any, *keys: str) -> dict[str, Any]:
    """The object at ``keys`` inside a JSON value; empty where there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return dict(value) if isinstance(value, Mapping) else {}


def read_curves(path: Path) -> Curves:
    """A CSV log of `vq_gan_3d.logs.CsvLog`.

    Raises:
        InputError: it cannot be read or has no column ``step``.
    """
    columns: dict[str, list[tuple[float, float]]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            if "step" not in (rows.fieldnames or ()):
                raise InputError(f"{path.name}: no column 'step': it is no log of a training")
            for count, row in enumerate(rows):
                if count >= _MAX_ROWS:
                    break
                step = _parsed(row["step"])
                for name, text in row.items():
                    if name is not None and abs(step) < _LARGEST and abs(value := _parsed(text)) < _LARGEST:
                        columns.setdefault(name, []).append((step, value))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path.name}: cannot be read ({one_line(error)}): copy it again") from error
    return Curves(columns)


def _parsed(text: Any) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):  # a row that a kill cut short
        return math.nan


def _walk(folder: Path, depth: int) -> list[Path]:
    """The folder and those below it; links are not followed."""
    places = [folder]
    if depth:
        try:
            below = sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
        except OSError:
            below = []
        for entry in below:
            if entry.name not in _PASSED_BY and not entry.name.startswith("."):
                places += _walk(entry, depth - 1)
    return places


def _name(place: Path, top: Path) -> str:
    relative = place.relative_to(top).as_posix()
    return relative if relative != "." else (top.resolve().name or "run")


def _is_result_of_run(folder: Path) -> bool:
    return (
        any((folder / name).is_file() for name, _, _ in _PARTS) and (folder.resolve().parent / "config.yaml").is_file()
    )


def _look(place: Path, name: str, found: Found) -> None:
    if (place / "config.yaml").is_file():
        try:
            run = _run(place, name, found)
        except InputError as error:
            found.damaged.append(f"{name}: {error}")
        else:
            if run is not None:
                found.runs.append(run)
    for file in dict.fromkeys(name for name, _, _ in _PARTS):
        if (place / file).is_file():
            try:
                content = _read_json(place / file)
            except InputError as error:
                found.damaged.append(f"{name}/{error}")
                continue
            for part in _parts_of(file, content):
                found.results.setdefault(part, []).append(Result(name, place, content))


def _parts_of(file: str, content: dict[str, Any]) -> list[str]:
    return [part for name, keys, part in _PARTS if name == file and mapping(content, *keys)]


def _run(place: Path, name: str, found: Found) -> TrainingRun | None:
    try:
        config = OmegaConf.load(place / "config.yaml")
        assert isinstance(config, DictConfig)
        kinds = {"diffusion": "model.conditioner", "codec": "model.code_channels", "classifier": "model.input"}
        kind = next((kind for kind, key in kinds.items() if OmegaConf.select(config, key) is not None), None)
    except Exception as error:  # whatever YAML and OmegaConf raise for a damaged file
        raise InputError(f"config.yaml cannot be read ({one_line(type(error).__name__)}): it is damaged") from error
    curves = {}
    for table in ("train", "validation"):
        if (path := place / "logs" / f"{table}.csv").is_file():
            try:
                curves[table] = read_curves(path)
            except InputError as error:
                found.damaged.append(f"{name}/logs/{error}")
    return TrainingRun(name, kind or "other", place, config, curves) if kind or curves else None


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InputError: none is there; the message starts with the file's name, without its folder.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            raise ValueError("too large")
        content = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path.name}: damaged ({type(error).__name__}): make it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path.name}: no JSON object: make it again")
    return content
