"""Cohorts as a configuration describes them: cases are volume sources, splits are by patient and stable."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from dataset.manifest import manifest
from dataset.pairs import COHORTS, CTCase, cohort_sources, describe
from dataset.pairs_case import read_sidecar
from dataset.sources import VolumeSource, prepare
from dataset.store import write_store
from dataset.volume_io import Volume, write_nifti
from errors import ConfigurationError, InputError
from tests.helpers import BASELINE, ROOT, run

AFFINE = np.array([[0, 0, -1.0, 10], [0, -1.0, 0, 20], [2.0, 0, 0, -30], [0, 0, 0, 1]])


def volume(seed: int = 0) -> Volume:
    return Volume(np.random.default_rng(seed).integers(-1000, 1000, (6, 8, 10)).astype(np.int16), AFFINE)


def cohort(folder: Path, patients: int, split: bool = False) -> dict[str, object]:
    lines = ["patient,ct,label" + (",split" if split else "")]
    for number in range(patients):
        (folder / f"p{number}.nii.gz").touch()
        side = f",{('train', 'validation', 'test')[number % 3]}" if split else ""
        lines.append(f"p{number},p{number}.nii.gz,{number % 2}{side}")
    (folder / "pairs.csv").write_text("\n".join(lines))
    return {"name": "xray_ctpa", "root_dir": str(folder), "validation_fraction": 0.2, "test_fraction": 0.1}


def test_a_case_is_a_volume_source(tmp_path):
    write_nifti(tmp_path / "a.nii.gz", volume())
    case: VolumeSource = CTCase("a", "p", tmp_path / "a.nii.gz")
    assert np.array_equal(case.load().hu, volume().hu)
    (tmp_path / "moved").mkdir()
    shutil.copy(tmp_path / "a.nii.gz", tmp_path / "moved")
    cohort = manifest({"training": [case]})
    assert cohort == manifest({"training": [CTCase("a", "p", tmp_path / "moved/a.nii.gz")]})
    before = case.identity
    write_nifti(tmp_path / "a.nii.gz", volume(1))
    assert case.identity != before
    assert manifest({"training": [case]}) != cohort
    prepared = prepare(case, (3, 4, 5), tmp_path / "cache")
    assert prepared.open().shape == (3, 4, 5)


def test_a_case_whose_file_is_gone_is_named(tmp_path):
    case = CTCase("a", "p", tmp_path / "a.nii.gz")
    for read in (case.load, lambda: case.identity):
        with pytest.raises(InputError, match=r"a\.nii\.gz"):
            read()


def test_a_store_is_read_like_a_file_with_its_own_sidecar(tmp_path):
    write_store(tmp_path / "a.b2nd", volume(), {"sidecar": {"kvp": 100}})
    (tmp_path / "a.json").write_text('{"kvp": 120}')
    loaded = CTCase("a", "p", tmp_path / "a.b2nd").load()
    assert np.array_equal(loaded.hu, volume().hu)
    assert np.array_equal(loaded.affine, AFFINE)
    assert read_sidecar(tmp_path / "a.b2nd") == {"kvp": 100}
    write_store(tmp_path / "b.b2nd", volume(), {})
    assert read_sidecar(tmp_path / "b.b2nd") == {}
    (tmp_path / "b.json").write_text('{"kvp": 120}')
    assert read_sidecar(tmp_path / "b.b2nd") == {"kvp": 120}


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"kvp":', b"\xff\xfe", b"[" * 100_000, b" " * (1 << 21)])
def test_t44_a_damaged_sidecar_is_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.json.*no usable sidecar"):
        read_sidecar(tmp_path / "a.nii.gz")


def test_every_case_gets_a_split_by_hash(tmp_path):
    cases = cohort_sources(cohort(tmp_path, 200))
    counts = {split: sum(case.split == split for case in cases) for split in ("train", "validation", "test")}
    assert sum(counts.values()) == 200
    assert counts["validation"] == pytest.approx(40, abs=20)
    assert counts["test"] == pytest.approx(20, abs=14)
    assert describe(cases).startswith(f"200 CTs of 200 patients ({counts['train']} train")


def test_new_patients_move_nobody(tmp_path):
    before = {case.patient: case.split for case in cohort_sources(cohort(tmp_path, 60))}
    after = {case.patient: case.split for case in cohort_sources(cohort(tmp_path, 90))}
    assert len(after) == 90
    assert before.items() <= after.items()


def test_a_split_column_counts_more_than_the_hash(tmp_path):
    cases = cohort_sources(cohort(tmp_path, 9, split=True))
    assert [case.split for case in cases] == ["train", "validation", "test"] * 3


def test_folds_hold_out_everybody_once_and_leave_the_test_set_alone(tmp_path):
    config = cohort(tmp_path, 60)
    runs = [{c.patient: c.split for c in cohort_sources({**config, "n_folds": 4, "fold": fold})} for fold in range(4)]
    test = {patient for patient, split in runs[0].items() if split == "test"}
    assert test
    held_out: list[str] = []
    for placed in runs:
        assert {patient for patient, split in placed.items() if split == "test"} == test
        held_out += [patient for patient, split in placed.items() if split == "validation"]
    assert sorted(held_out) == sorted(runs[0].keys() - test)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"name": "mimic"}, "rspect, lidc, xray_ctpa"),
        ({"name": "rspect"}, "dataset.root_dir"),
        ({"name": "lidc"}, "dataset.root_dir"),
        ({"name": "xray_ctpa"}, "dataset.csv or dataset.root_dir"),
        ({"name": "rspect", "root_dir": "/no/such/folder"}, "/no/such/folder"),
    ],
)
def test_bad_configurations_are_refused(config, word):
    with pytest.raises(ConfigurationError) as caught:
        cohort_sources(config)
    assert word in str(caught.value)


@pytest.mark.parametrize("name", sorted(COHORTS))
def test_presets_add_plain_keys_to_the_group(name):
    with initialize_config_dir(str(ROOT / "config"), version_base=None):
        group = OmegaConf.to_container(compose("dataset/" + name), resolve=True)
        phantom = OmegaConf.to_container(compose("dataset/phantom"), resolve=True)
    values, inherited = group["dataset"], phantom["dataset"]
    assert values["name"] == name
    assert inherited.keys() <= values.keys()
    assert json.loads(json.dumps(values)) == values
    assert (values["n_folds"], values["fold"], values["test_fraction"]) == (None, None, 0.1)
    with pytest.raises(ConfigurationError, match=f"dataset={name} needs"):
        cohort_sources(values)


@pytest.mark.slow
def test_a_trainer_takes_a_cohort_and_never_opens_its_test_set(tmp_path):
    lines = ["patient,ct,split"]
    for number in range(6):
        split = "test" if number == 0 else "validation" if number == 1 else "train"
        path = tmp_path / f"p{number}.nii.gz"
        if split == "test":
            path.write_bytes(b"whoever opens this fails")
        else:
            write_nifti(path, volume(number))
        lines.append(f"p{number},{path.name},{split}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    options = ["dataset=xray_ctpa", f"dataset.csv={tmp_path}/pairs.csv", "training.max_steps=1"]
    result = run(BASELINE, *options, f"output_dir={tmp_path}/out", f"dataset.cache_dir={tmp_path}/cache", cwd=tmp_path)
    assert "4 for training, 1 held out" in result.stdout + result.stderr
    assert not list((tmp_path / "cache").glob("p0*"))
