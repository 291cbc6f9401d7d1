"""Both trainers on a folder of stores, and the patch-wise one on a folder of NIfTI that becomes stores by itself."""

from __future__ import annotations

import shutil
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from dataset.from_config import data_module
from dataset.sources import StoreSource
from dataset.store import write_store
from dataset.volume_io import Volume, read_nifti, write_nifti
from errors import ConfigurationError
from tests.helpers import (
    BASELINE,
    PATCHWISE,
    REAL_DATA,
    ROOT,
    STATE_KEYS,
    assert_one_line_error,
    assert_same_state,
    run,
)
from vq_gan_3d.checkpointing import load_checkpoint

# index (d, h, w, 1) -> RAS+ mm at 2 mm
AFFINE = np.array([[0, 0, -2.0, 0], [0, -2.0, 0, 0], [2.0, 0, 0, 0], [0, 0, 0, 1]])
PATCHES = ["dataset.size=null", "dataset.patch_size=[16,32,32]", "dataset.patches_per_volume=2"]


def volume(number: int) -> Volume:
    hu = np.random.default_rng(number).integers(-1000, 1000, (20 + number, 40, 48)).astype(np.int16)
    return Volume(hu, AFFINE)


@pytest.fixture
def stores(tmp_path: Path) -> Path:
    folder = tmp_path / "stores"
    folder.mkdir()
    for number in range(4):
        write_store(folder / f"patient_{number}.b2nd", volume(number), {})
    return folder


def on_stores(folder: Path, *more: str) -> list[str]:
    held_out = "dataset.validation=[patient_0]"
    return ["dataset=store", f"dataset.root_dir={folder}", held_out, "dataset.cache_dir=cache", *more]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(run_dir / "outputs/checkpoints/final.ckpt")["state_dict"]


def test_patchwise_on_stores_without_copies(stores: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in stores.iterdir()}
    run(PATCHWISE, *on_stores(stores, *PATCHES, "training.max_steps=3"), cwd=tmp_path)
    assert not list((tmp_path / "cache").glob("*.b2nd"))
    assert {path.name: path.read_bytes() for path in stores.iterdir()} == before
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values() if tensor.is_floating_point())


@pytest.mark.slow
def test_baseline_on_stores_resamples_into_the_cache(stores: Path, tmp_path: Path) -> None:
    whole = ["dataset.size=[16,32,32]", "dataset.patch_size=null", "dataset.patches_per_volume=1"]
    run(BASELINE, *on_stores(stores, *whole, "training.max_steps=2"), cwd=tmp_path)
    assert len(list((tmp_path / "cache").glob("*.b2nd"))) == 4


@pytest.mark.slow
def test_nifti_and_stores_train_alike_and_damaged_caches_are_made_again(stores: Path, tmp_path: Path) -> None:
    nifti = tmp_path / "nifti"
    nifti.mkdir()
    for number in range(4):
        write_nifti(nifti / f"patient_{number}.nii.gz", volume(number))
    results = []
    for name, dataset, root in [("a", "store", stores), ("b", "full_resolution_ctpa", nifti), ("c", "", nifti)]:
        cwd = tmp_path / name
        cwd.mkdir()
        if name == "c":  # the cache of the run before, one volume of it damaged
            shutil.copytree(tmp_path / "b" / "cache", cwd / "cache")
            victim = sorted((cwd / "cache").glob("patient_2-*.b2nd"))[0]
            good = victim.read_bytes()
            victim.write_bytes(good[: len(good) // 2] + bytes([good[len(good) // 2] ^ 1]) + good[len(good) // 2 + 1 :])
        options = on_stores(root, *PATCHES, "dataset.tissue_bias=0.5", "training.max_steps=4")
        options[0] = f"dataset={dataset or 'full_resolution_ctpa'}"
        result = run(PATCHWISE, *options, cwd=cwd)
        if name == "c":
            assert str(victim.name) in result.stderr
            assert "made again" in result.stderr
            assert victim.read_bytes() == good
        results.append(weights(cwd))
    assert_same_state(results[0], results[1])
    assert_same_state(results[0], results[2])


@pytest.mark.slow
def test_t09_biased_patches_resume_bit_exactly_with_workers(stores: Path, tmp_path: Path) -> None:
    checkpoints = []
    for name, parts, workers in [("whole", [6], 0), ("parts", [2, 6], 1)]:
        cwd = tmp_path / name
        cwd.mkdir()
        for number, steps in enumerate(parts):
            more = ["dataset.tissue_bias=0.5", f"training.max_steps={steps}", f"training.num_workers={workers}"]
            resume = ["ckpt_path=last"] if number else []
            run(PATCHWISE, *on_stores(stores, *PATCHES, *more, *resume), cwd=cwd)
        checkpoints.append(load_checkpoint(cwd / "outputs/checkpoints/final.ckpt"))
    for key in STATE_KEYS:
        assert_same_state(checkpoints[0][key], checkpoints[1][key], key)


@pytest.mark.slow
def test_one_damaged_store_of_four_is_named(stores: Path, tmp_path: Path) -> None:
    path = stores / "patient_2.b2nd"
    path.write_bytes(path.read_bytes()[:-3])
    options = on_stores(stores, *PATCHES, "training.max_steps=1", "dataset.max_bad_fraction=0.1")
    result = run(PATCHWISE, *options, cwd=tmp_path, check=3)
    assert_one_line_error(result, "1 of 3 training volumes", str(path))


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "patchwise_512x512x604" / "config")):
        return compose("base_cfg", list(overrides))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("dataset.root_dir=null", r"dataset\.root_dir"),
        ("dataset.tissue_bias=1.5", r"dataset\.tissue_bias=1\.5"),
        ("dataset.tissue_bias=-1", r"dataset\.tissue_bias=-1"),
        ("dataset.patch_size=null", r"dataset\.patch_size"),
    ],
)
def test_settings_that_cannot_be(stores: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        data_module(composed(*on_stores(stores, *PATCHES, override)))


def test_cohorts_come_from_their_tables_with_their_splits(monkeypatch: pytest.MonkeyPatch, stores: Path) -> None:
    """The configured names are for the cohort, which has marked its cases by them."""
    seen: dict[str, Any] = {}

    @dataclass(frozen=True)
    class Case(StoreSource):
        split: str = "train"

    def cohort_sources(config: dict[str, Any]) -> list[Case]:
        seen.update(config)
        splits = ("validation", "train", "test", "train")
        return [Case(path, split) for path, split in zip(sorted(stores.iterdir()), splits, strict=True)]

    monkeypatch.setitem(sys.modules, "dataset.pairs", types.SimpleNamespace(cohort_sources=cohort_sources))
    data = data_module(composed(*on_stores(stores, *PATCHES, "dataset.name=lidc")))
    assert seen["root_dir"] == str(stores)
    assert seen["validation"] == ["patient_0"]
    assert [source.name for source in data.sources["training"]] == ["patient_1", "patient_3"]
    assert [source.name for source in data.sources["validation"]] == ["patient_0"]


@pytest.mark.slow
def test_real_ct_on_its_native_grid(tmp_path: Path) -> None:
    sources = [REAL_DATA / "ct_native" / f"lidc_000{number}.nii.gz" for number in (1, 2)]
    if not sources[0].exists():
        pytest.skip("shared/data is not here")
    folder = tmp_path / "stores"
    folder.mkdir()
    for path in sources:
        write_store(folder / path.name.replace(".nii.gz", ".b2nd"), read_nifti(path), {})
    options = ["dataset=store", f"dataset.root_dir={folder}", "dataset.validation=[lidc_0001]", *PATCHES]
    run(PATCHWISE, *options, "dataset.tissue_bias=1.0", "training.max_steps=2", cwd=tmp_path)
