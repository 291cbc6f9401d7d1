"""Cohorts of CTs with their X-rays, labels, reports and splits: what ``dataset=rspect|lidc|xray_ctpa`` describe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dataset.pairs_case import CTCase
from dataset.pairs_keys import read_key
from dataset.pairs_table import read_pairs
from dataset.presets import lidc_cases, rspect_cases
from dataset.splits import TEST, TRAIN, VALIDATION, assign_splits
from errors import ConfigurationError

__all__ = ["COHORTS", "CTCase", "cohort_sources", "describe", "read_pairs"]


def _rspect(config: dict[str, Any]) -> list[CTCase]:
    root = _root(config)
    return rspect_cases(root, _path(config, "csv") or root / "train.csv", read_key(_path(config, "key"), root))


def _lidc(config: dict[str, Any]) -> list[CTCase]:
    root = _root(config)
    return lidc_cases(root, _path(config, "xray_dir"), read_key(_path(config, "key"), root))


def _xray_ctpa(config: dict[str, Any]) -> list[CTCase]:
    return read_pairs(_path(config, "csv") or _root(config, "csv") / "pairs.csv")


# dataset.name -> how to read it
COHORTS: dict[str, Callable[[dict[str, Any]], list[CTCase]]] = {
    "rspect": _rspect,
    "lidc": _lidc,
    "xray_ctpa": _xray_ctpa,
}


def cohort_sources(dataset_config: dict[str, Any]) -> list[CTCase]:
    """The cases of a configured cohort, each with its split.

    Args:
        dataset_config: the ``dataset`` group as plain values: ``name`` (one of ``COHORTS``), ``root_dir``, ``csv``,
            ``xray_dir``, ``key``, ``validation_fraction``, ``test_fraction``, ``validation``, ``n_folds``, ``fold``.

    Returns:
        Cases with ``split`` train, validation or test; no patient in two of them (`dataset.splits.assign_splits`).

    Raises:
        ConfigurationError: an unknown name, a folder that is not there, or splits that cannot be made.
        InputError: tables or files that are not what they should be.
    """
    name = dataset_config.get("name")
    if name not in COHORTS:
        raise ConfigurationError(f"dataset.name={name}: no cohort, known are {', '.join(COHORTS)}")
    cases = COHORTS[name](dataset_config)
    splits = assign_splits(
        {case.patient: case.split for case in cases},
        validation_fraction=float(dataset_config.get("validation_fraction") or 0.0),
        test_fraction=float(dataset_config.get("test_fraction") or 0.0),
        validation=[str(patient) for patient in dataset_config.get("validation") or ()],
        n_folds=dataset_config.get("n_folds"),
        fold=dataset_config.get("fold"),
    )
    return [replace(case, split=splits[case.patient]) for case in cases]


def describe(cases: list[CTCase]) -> str:
    """One line for a log: volumes by split, patients, labels and X-rays."""
    volumes = Counter(case.split for case in cases)
    labels = Counter(case.label for case in cases)
    parts = ", ".join(f"{volumes[split]} {split}" for split in (TRAIN, VALIDATION, TEST))
    return (
        f"{len(cases)} CTs of {len({case.patient for case in cases})} patients ({parts}); "
        f"embolism: {labels[True]} yes, {labels[False]} no, {labels[None]} unknown; "
        f"{sum(case.needs_drr for case in cases)} without an X-ray"
    )


def _path(config: dict[str, Any], key: str) -> Path | None:
    return Path(config[key]).expanduser().absolute() if config.get(key) else None


def _root(config: dict[str, Any], *alternatives: str) -> Path:
    root = _path(config, "root_dir")
    if root is None:
        keys = " or ".join(f"dataset.{key}" for key in (*alternatives, "root_dir"))
        raise ConfigurationError(f"dataset={config['name']} needs {keys}: see config/dataset/{config['name']}.yaml")
    if not root.is_dir():
        raise ConfigurationError(f"{root}: no such folder: correct dataset.root_dir")
    return root
