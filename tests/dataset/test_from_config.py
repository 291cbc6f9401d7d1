"""The volumes that a configuration's ``dataset.*`` names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import DictConfig, OmegaConf

from dataset.from_config import recorded, sources_of_test_split, volume_sources
from dataset.phantom import sample_patient
from dataset.sources import PhantomSource, prepare
from errors import ConfigurationError, InputError
from tests.helpers import ROOT

# Every one of 150 phantoms lies inside this field (429×429×330 mm): lungs off its ends, skin inside its sides.
GRID, SPACING = [32, 64, 64], [10.3, 6.7, 6.7]


def configured(**changes: Any) -> DictConfig:
    """The phantom group with changes."""
    merged = OmegaConf.merge(OmegaConf.load(ROOT / "config/dataset/phantom.yaml"), changes)
    assert isinstance(merged, DictConfig)
    return merged


def test_one_grid_in_mm_shows_who_is_large(tmp_path: Path) -> None:
    width = {}
    for seed in (390, 282):  # the largest and the smallest of the first 400
        grid = {"size": [16, 32, 32], "spacing_mm": [21, 14, 14]}
        (source,) = volume_sources(configured(first_seed=seed, n_patients=1, **grid))
        volume = prepare(source, (16, 32, 32), tmp_path)
        assert np.linalg.norm(volume.affine[:3, :3], axis=0) == pytest.approx(grid["spacing_mm"])
        body = np.asarray(volume.open())[8] > -500
        assert not body[:, [0, -1]].any()
        assert not body[[0, -1]].any()
        width[seed] = 14 * np.count_nonzero(body.any(axis=0))
        patient = sample_patient(seed)
        assert width[seed] == pytest.approx(
            320 * patient.scale_lateral + 2 * (patient.muscle_mm + patient.fat_mm), abs=30
        )
    assert width[390] > width[282] + 80


def test_without_a_spacing_every_thorax_fills_its_volume() -> None:
    fitted = volume_sources(configured(size=GRID, n_patients=2))
    fixed = volume_sources(configured(size=GRID, n_patients=2, spacing_mm=SPACING))
    assert fitted[0] == PhantomSource(0, (32, 64, 64))
    assert len({source.identity for source in (*fitted, *fixed)}) == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spacing_mm": [10, 6]}, "no .d, h, w. in mm"),
        ({"spacing_mm": SPACING, "name": "nifti"}, "of phantoms, dataset=nifti"),
        ({"spacing_mm": SPACING, "root_dir": "somewhere"}, "of phantoms"),
        ({"spacing_mm": SPACING, "name": "lidc"}, "of phantoms, dataset=lidc"),
        ({"spacing_mm": ["a", 1, 1]}, "no .d, h, w. in mm"),
        ({"mirrored_share": 0.5, "name": "nifti"}, "mirrored_share is of phantoms, dataset=nifti"),
        ({"mirrored_share": -0.5}, "a share from 0 to 1"),
    ],
)
def test_a_grid_or_share_that_cannot_be_carried_out(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        volume_sources(configured(**changes))


def test_a_share_of_the_phantoms_is_mirrored() -> None:
    plain = volume_sources(configured(size=[6, 16, 16], n_patients=40))
    some = volume_sources(configured(size=[6, 16, 16], n_patients=40, mirrored_share=0.2))
    changed = [number for number in range(40) if plain[number].identity != some[number].identity]
    assert 2 < len(changed) < 16
    assert [source.name for source in plain] == [source.name for source in some]
    before, after = plain[changed[0]].load(), some[changed[0]].load()
    assert np.array_equal(after.hu, before.hu[..., ::-1])


def test_a_run_records_its_data_and_models_by_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/who")
    dataset = configured(root_dir="cohort", splits="/data/pairs.csv", cache_dir="~/cache", n_patients=7)
    config = OmegaConf.create({"dataset": dataset, "pretrained_vqgan": "codec.ckpt", "output_dir": "outputs"})
    before = OmegaConf.to_yaml(config)
    again = OmegaConf.create(recorded(config))
    assert again.dataset.root_dir == str(tmp_path / "cohort")
    assert (again.dataset.splits, again.dataset.cache_dir) == ("/data/pairs.csv", "/home/who/cache")
    assert (again.pretrained_vqgan, again.output_dir) == (str(tmp_path / "codec.ckpt"), "outputs")
    assert again.dataset.n_patients == 7
    assert OmegaConf.to_yaml(config) == before


def test_test_patients_of_a_table_and_of_a_cohort_without_any(tmp_path: Path) -> None:
    rows = ["patient,ct,split"]
    for number, split in enumerate(("train", "train", "val", "Test", "test")):
        (tmp_path / f"p{number}.nii.gz").touch()
        rows.append(f"p{number},p{number}.nii.gz,{split}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    cohort = configured(name="xray_ctpa", csv=str(tmp_path / "pairs.csv"))
    folder = configured(name="nifti", root_dir=str(tmp_path), splits=str(tmp_path / "pairs.csv"))
    for config in (cohort, folder):
        assert [source.patient for source in sources_of_test_split(OmegaConf.create({"dataset": config}))] == [
            "p3",
            "p4",
        ]
    with pytest.raises(InputError, match="none of its 3 volumes is of a test patient"):
        sources_of_test_split(OmegaConf.create({"dataset": configured(n_patients=3, size=GRID)}))
