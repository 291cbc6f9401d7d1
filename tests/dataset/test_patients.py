"""Whose volume a file is, and that no patient is on two sides of a split, through the real data module."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dataset.data_module import VolumeDataModule
from dataset.from_config import volume_sources
from dataset.pairs import cohort_sources
from dataset.sources import StoreSource, VolumeSource, find_nifti, find_stores
from dataset.splits import hash_fraction
from dataset.store import write_store
from dataset.volume_io import Volume
from errors import ConfigurationError, InputError
from tests.dataset.test_data_module import module
from tests.dataset.test_from_config import configured
from tests.dataset.test_sources import AFFINE, nifti

PATIENTS = [f"p{number:02d}" for number in range(20)]


def sides(data: VolumeDataModule) -> dict[str, list[str]]:
    return {split: [source.patient for source in sources] for split, sources in data.sources.items()}


def assert_on_one_side(sources: list[VolumeSource], volumes: int) -> dict[str, list[str]]:
    """Training and validation share no patient, and all volumes of a patient are there."""
    found = sides(module(sources))
    assert found["training"]
    assert found["validation"]
    assert set(found["training"]).isdisjoint(found["validation"])
    for patients in found.values():
        assert all(patients.count(patient) == volumes for patient in patients)
    return found


@pytest.mark.parametrize("kind", ["nifti", "store"])
def test_no_patient_with_several_volumes_is_on_two_sides(tmp_path: Path, kind: str) -> None:
    hu = np.random.default_rng(0).integers(-1000, 1000, (4, 4, 4)).astype(np.int16)
    for number, patient in enumerate(PATIENTS * 3):
        stem, sidecar = f"volume_{number:03d}", {"format": 1, "patient": patient}
        if kind == "nifti":
            nifti(tmp_path / f"{stem}.nii.gz", shape=(4, 4, 4))
            (tmp_path / f"{stem}.json").write_text(json.dumps(sidecar))
        else:
            write_store(tmp_path / f"{stem}.b2nd", Volume(hu, AFFINE), {"sidecar": sidecar})
    found = assert_on_one_side(list((find_nifti if kind == "nifti" else find_stores)(str(tmp_path))), volumes=3)
    assert set(found["validation"]) == {patient for patient in PATIENTS if hash_fraction(patient) < 0.2}
    assert set(found["training"]) | set(found["validation"]) == set(PATIENTS)


def test_no_patient_of_a_table_is_on_two_sides(tmp_path: Path) -> None:
    rows = [f"{patient},{patient}_{number}.nii.gz" for patient in PATIENTS for number in range(3)]
    for row in rows:
        (tmp_path / row.split(",")[1]).touch()
    (tmp_path / "pairs.csv").write_text("\n".join(["patient,ct", *rows]))
    config = {"name": "xray_ctpa", "root_dir": str(tmp_path), "validation_fraction": 0.2, "test_fraction": 0.2}
    cases = cohort_sources(config)
    found = assert_on_one_side(list(cases), volumes=3)
    tested = {case.patient for case in cases if case.split == "test"}
    assert tested
    assert tested.isdisjoint([*found["training"], *found["validation"]])


def test_the_sidecar_names_the_patient(tmp_path, caplog):
    """Two studies of one patient belong on one side of a split; without a sidecar the file's stem is all there is."""
    for name, patient in (("p_1", "p"), ("p_2", "p"), ("q_1", "q")):
        nifti(tmp_path / f"{name}.nii.gz")
        (tmp_path / f"{name}.json").write_text(json.dumps({"format": 1, "patient": patient}))
    assert [source.patient for source in find_nifti(str(tmp_path))] == ["p", "p", "q"]
    assert not caplog.records
    nifti(tmp_path / "plain.nii")
    nifti(tmp_path / "foreign.nii")
    (tmp_path / "foreign.json").write_text('{"patient": "p"}')  # of another program, which may call anything so
    assert [source.patient for source in find_nifti(str(tmp_path))] == ["foreign", "p", "p", "plain", "q"]
    [record] = caplog.records
    assert f"{tmp_path}: 2 of 5 volumes without a sidecar" in record.message
    sidecar = {"format": 1, "patient": "p"}
    write_store(tmp_path / "s.b2nd", Volume(np.zeros((4, 4, 4), np.int16), AFFINE), {"sidecar": sidecar})
    assert StoreSource(tmp_path / "s.b2nd").patient == "p"


def test_a_damaged_sidecar_ends_the_run_before_a_patient_lands_on_two_sides(tmp_path):
    for name in ("p_1", "p_2"):
        nifti(tmp_path / f"{name}.nii.gz")
        (tmp_path / f"{name}.json").write_text(json.dumps({"format": 1, "patient": "p"}))
    (tmp_path / "p_2.json").write_text('{"format": 1, "pati')
    with pytest.raises(InputError, match=r"p_2\.json: no usable sidecar"):
        find_nifti(str(tmp_path))


@pytest.mark.parametrize("name", ["nifti", "store"])
def test_a_folder_is_split_as_the_table_of_its_pairs(tmp_path: Path, name: str, caplog) -> None:
    """The first stage on native volumes must not see whom the table keeps for validation and test."""
    sides = {PATIENTS[number]: ("train", "validation", "test")[number % 3] for number in range(15)}
    hu = np.random.default_rng(0).integers(-1000, 1000, (4, 4, 4)).astype(np.int16)
    folder = tmp_path / "volumes"
    folder.mkdir()
    for patient in PATIENTS:  # five of them are not in the table
        if name == "nifti":
            nifti(folder / f"{patient}.nii.gz", shape=(4, 4, 4))
        else:
            write_store(folder / f"{patient}.b2nd", Volume(hu, AFFINE), {})
        (tmp_path / f"{patient}.nii.gz").touch()
    table = tmp_path / "pairs.csv"
    rows = [f"{patient},{patient}.nii.gz,{side}" for patient, side in sides.items()]
    table.write_text("\n".join(["patient,ct,split", *rows]))
    config = configured(name=name, root_dir=str(folder), splits=str(table))
    data = module(volume_sources(config))
    for mine, theirs in (("training", "train"), ("validation", "validation")):
        assert {source.patient for source in data.sources[mine]} == {p for p, side in sides.items() if side == theirs}
    assert "5 volumes are of patients it does not name" in caplog.text

    table.write_text("\n".join(["patient,ct", *(row.rpartition(",")[0] for row in rows)]))
    with pytest.raises(ConfigurationError, match="no split column"):
        volume_sources(config)
    table.write_text(f"patient,ct,split\nsomebody,{PATIENTS[0]}.nii.gz,train")
    with pytest.raises(ConfigurationError, match="none of the 20 volumes"):
        volume_sources(config)
    with pytest.raises(ConfigurationError, match=r"dataset.splits is for folders"):
        volume_sources(configured(splits=str(table)))
