"""What a bundle's card says of the data: how many patients, as far as the run and its data still tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from ddpm.export_bundle import training_facts
from ddpm.model_card import _measured
from tests.helpers import ROOT


def recorded(folder: Path, **dataset: Any) -> Path:
    """A run's configuration of six phantoms, two of them held out; ``dataset`` changes it."""
    d = {
        **OmegaConf.load(ROOT / "config/dataset/phantom.yaml"),
        **{"n_patients": 6, "size": [16, 16, 16]},
        **{"validation": ["phantom_00001", "phantom_00004"], "cache_dir": str(folder)},
    }
    training = {"batch_size": 1, "num_workers": 0, "worker_timeout_s": 60, "seed": 0}
    OmegaConf.save(OmegaConf.create({"dataset": d | dataset, "training": training}), folder / "config.yaml")
    return folder


def test_patients_of_the_training_and_held_out_are_counted(tmp_path: Path) -> None:
    facts = training_facts({}, recorded(tmp_path), "six of them")
    assert (facts["patients of the training"], facts["patients held out from it"]) == (4, 2)
    assert facts["data"] == "six of them"


@pytest.mark.parametrize("gone", [{"name": "store", "root_dir": "/gone"}, {"name": "xray_ctpa", "csv": "/gone.csv"}])
def test_data_that_are_elsewhere_are_not_counted(tmp_path: Path, gone: dict[str, str]) -> None:
    facts = training_facts({}, recorded(tmp_path, **gone), None)
    assert facts == {"dataset": gone["name"]}


def test_the_card_says_whose_figures_they_are() -> None:
    value = {"estimate": 20.0, "low": 19.0, "high": 21.0}
    chirality = {"bar": "chirality", "low": -0.1, "asked": 0.0, "passed": False}
    report = {"cases": 3, "scores": {"right": {"bias_hu": value, "psnr_slice_db": value}}, "bars": [chirality]}
    shown = "\n".join(_measured(report | {"sampling": {"split": "validation"}}))
    for words in (
        "3 held-out patients",
        "PSNR per slice, dB",
        "+20.0 [+19.0, +21.0]",
        "chirality above 0; lower end -0.1",
    ):
        assert words in shown
    assert "3 patients **of the training**" in "\n".join(_measured(report | {"sampling": {"split": "training"}}))
