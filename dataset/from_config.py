"""The data that a configuration's ``dataset.*`` and ``training.*`` describe, for every trainer."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from dataset.data_module import VolumeDataModule
from dataset.phantom import is_mirrored
from dataset.sources import FileSource, PhantomSource, VolumeSource, default_cache, find_nifti, find_stores
from dataset.splits import SPLIT_NAMES, TEST
from errors import ConfigurationError, InputError

log = logging.getLogger(__name__)
F = TypeVar("F", bound=FileSource)
# Public collections with tables of their own: `dataset.pairs` reads them.
COHORTS = ("rspect", "lidc", "xray_ctpa")
# Settings that name a file or a folder of the data or of a trained model.
_PATHS = (
    *(f"dataset.{key}" for key in ("csv", "root_dir", "xray_dir", "key", "splits", "latents_dir", "cache_dir")),
    "pretrained_vqgan",
    "pretrained_ddpm",
)


def data_module(config: DictConfig) -> VolumeDataModule:
    """The data that ``dataset.*`` and ``training.*`` describe."""
    d, t = config.dataset, config.training
    size = size_dhw(d.size)
    tissue_bias = float(d.tissue_bias)
    if not 0 <= tissue_bias <= 1:
        raise ConfigurationError(f"dataset.tissue_bias={tissue_bias}: a share of the patches is in [0, 1]")
    if not isinstance(d.validation, Sequence) or isinstance(d.validation, str):
        raise ConfigurationError(f"dataset.validation={d.validation}: give a list of patients, [{d.validation}]")
    sources = volume_sources(config.dataset)
    if size is None and d.patch_size is None:
        raise ConfigurationError("dataset.size=null keeps native grids: set dataset.patch_size to train on patches")
    return VolumeDataModule(
        sources,
        size_dhw=size,
        patch_dhw=size_dhw(d.patch_size),
        patches_per_volume=d.patches_per_volume,
        validation_fraction=d.validation_fraction,
        # a cohort has chosen its held-out patients by them already, and marks its cases
        validation=[] if d.name in COHORTS else list(d.validation),
        cache=Path(d.cache_dir) if d.cache_dir else default_cache(),
        batch_size=t.batch_size,
        num_workers=t.num_workers,
        worker_timeout_s=t.worker_timeout_s,
        seed=t.seed,
        max_bad_fraction=d.max_bad_fraction,
        tissue_bias=tissue_bias,
        validation_tiles=d.validation_tiles,
        overfit_patches=d.overfit_patches,
    )


def volume_sources(d: DictConfig) -> list[VolumeSource]:
    """The volumes that ``dataset.*`` names, in a stable order.

    Raises:
        ConfigurationError: no folder, or no size of phantoms.
        InputError: the folder holds no volumes.
    """
    own = d.name in (*COHORTS, "store", "nifti") or d.root_dir
    if own and d.spacing_mm is not None:
        raise ConfigurationError(f"dataset.spacing_mm is of phantoms, dataset={d.name} has grids of its own: leave it")
    if own and d.mirrored_share:
        raise ConfigurationError(f"dataset.mirrored_share is of phantoms, dataset={d.name} has its own: leave it 0")
    if d.splits and (d.name in COHORTS or not own):
        raise ConfigurationError(f"dataset.splits is for folders of volumes, dataset={d.name} has its own: leave it")
    if d.name in COHORTS:
        from dataset.pairs import cohort_sources  # reads tables, which other data need not load

        return list(cohort_sources(plain_dict(d)))
    if d.name == "store":
        return list(_split_by_table(find_stores(d.root_dir), d.splits))
    if d.name == "nifti" or d.root_dir:
        return list(_split_by_table(find_nifti(d.root_dir), d.splits))
    grid = size_dhw(d.phantom_size) or size_dhw(d.size)
    if grid is None:
        raise ConfigurationError("dataset=phantom needs dataset.size or dataset.phantom_size as [D, H, W]")
    log.info("data: phantom thoraces; your own: dataset=nifti dataset.root_dir=/folder/of/nii.gz")
    spacing = _spacing_mm(d.spacing_mm)
    seeds = range(d.first_seed, d.first_seed + d.n_patients)
    return [PhantomSource(seed, grid, spacing, is_mirrored(seed, d.mirrored_share)) for seed in seeds]


def sources_of_test_split(config: DictConfig) -> list[VolumeSource]:
    """The test patients of a run's cohort, which no training opens; where `VolumeDataModule` is to prepare them, they
    take the place of its validation.

    Raises:
        InputError: the cohort has none, or cannot be read.
    """
    sources = volume_sources(config.dataset)
    found = [source for source in sources if SPLIT_NAMES.get(str(getattr(source, "split", None)).lower()) == TEST]
    if not found:
        raise InputError(
            f"dataset={config.dataset.name}: none of its {len(sources)} volumes is of a test patient (make_pairs.py "
            "--test, dataset.test_fraction): leave --split test"
        )
    return found


def _split_by_table(sources: Sequence[F], table: str | None) -> list[F]:
    """Volumes with the splits of a table of pairs, so that a folder is split as the cohort was.

    Whoever is not in the table is left out with a warning: nobody has said on which side they are.

    Raises:
        ConfigurationError: the table has no splits, or none of the patients.
        InputError: it cannot be read.
    """
    if not table:
        return list(sources)
    from dataset.pairs_table import read_pairs

    splits = {case.patient: case.split for case in read_pairs(Path(table).expanduser())}
    if None in splits.values():
        raise ConfigurationError(
            f"{table}: has no split column, which dataset.splits needs: make it with make_pairs.py"
        )
    known = [replace(source, split=splits[source.patient]) for source in sources if source.patient in splits]
    if not known:
        raise ConfigurationError(f"{table}: none of the {len(sources)} volumes is of a patient of this table")
    if len(known) < len(sources):
        log.warning("%s: %d volumes are of patients it does not name: left out", table, len(sources) - len(known))
    return known


def size_dhw(value: Any) -> tuple[int, int, int] | None:
    """A configured size as [D, H, W], None for null."""
    if value is None:
        return None
    if not isinstance(value, Sequence) or len(value) != 3 or not all(type(n) is int and n >= 1 for n in value):
        raise ConfigurationError(f"size {value} is no [D, H, W] of positive integers")
    return int(value[0]), int(value[1]), int(value[2])


def _spacing_mm(value: Any) -> tuple[float, float, float] | None:
    if value is None:
        return None
    try:
        d, h, w = (float(step) for step in value)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"dataset.spacing_mm={value} is no [d, h, w] in mm") from error
    return d, h, w


def recorded(config: DictConfig) -> str:
    """A configuration as a run records it, in YAML: its data and models by absolute paths.

    Evaluations read it wherever they are started; a relative path was relative to the folder of the training.
    """
    record = copy.deepcopy(config)
    for key in _PATHS:
        if named := OmegaConf.select(record, key):
            OmegaConf.update(record, key, str(Path(named).expanduser().absolute()))
    return OmegaConf.to_yaml(record, resolve=True)


def run_config(run: Path) -> DictConfig:
    """The configuration that a training run recorded in its output_dir.

    Raises:
        InputError: there is none.
    """
    record = run / "config.yaml"
    if not record.is_file():
        raise InputError(f"{record}: not there: --run wants the output_dir of a training run")
    config = OmegaConf.load(record)
    assert isinstance(config, DictConfig)
    return config


def plain_dict(config: DictConfig) -> dict[str, Any]:
    """A configuration as plain containers, interpolations resolved."""
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}
