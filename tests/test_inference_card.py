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
def test_data_that_are_elsewhere_are_not_counted_and_who_exports_is_told(
    tmp_path: Path, gone: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    facts = training_facts({}, recorded(tmp_path, **gone), None)
    assert facts == {"dataset": gone["name"]}
    (line,) = capsys.readouterr().err.splitlines()
    assert "will not count patients" in line
    assert "/gone" in line


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
    assert "3 patients of the test set" in "\n".join(_measured(report | {"sampling": {"split": "test"}}))


def test_the_card_says_how_its_volumes_were_drawn() -> None:
    few = {"bar": "patients evaluated", "low": 3, "asked": 64, "passed": False}
    sampling = {"steps": 12, "sampler": "ddim", "guidance": 1.5, "rescale": 0.0, "samples": 4, "seed": 2}
    report: dict[str, Any] = {"cases": 3, "scores": {}, "bars": [few], "sampling": sampling | {"told": ["radiograph"]}}
    shown = "\n".join(_measured(report))
    assert (
        "Volumes drawn with: 12 steps, sampler ddim, guidance 1.5, rescale 0, 4 sample(s) of each X-ray, seed 2, X-ray "
        "alone."
    ) in shown
    assert "Bar: patients evaluated at least 64; 3: **missed**." in shown
    report["sampling"]["told"] += ["report", "label"]
    assert "was told the patient's own report and label." in "\n".join(_measured(report))
