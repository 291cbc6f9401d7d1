"""A run on a cohort with a table: its test patients, its reports and labels, its data from another folder."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from dataset.from_config import run_config
from dataset.phantom import make_phantom
from dataset.volume_io import Volume, write_nifti
from ddpm.conditions import UNKNOWN_LABEL
from ddpm.export_bundle import training_facts
from ddpm.generate import Generator
from evaluation import reconstruct, sampler_table, xray_to_ct
from evaluation.held_out import HeldOut, Sampling, told
from tests.ddpm.tiny import ddpm_command, saved_codec, tiny_codec
from tests.evaluation.test_clinical import conditions
from tests.helpers import assert_one_line_error, environment
from tests.in_process import call_main
from tests.inference_model import moved_network

SPLITS = {"train": range(4), "validation": range(4, 6), "test": range(6, 9)}
RUN = ("dataset=xray_ctpa", "dataset.csv=cohort/pairs.csv", "dataset.cache_dir=cache", "output_dir=run",
       "training.max_steps=4", "model.conditioner.label=true", "model.conditioner.text=bytes")  # fmt: skip
Script = Callable[..., "subprocess.CompletedProcess[str]"]


def train(folder: Path, *overrides: str) -> None:
    """Train in a folder, with relative paths throughout; 600 s allow for a loaded machine."""
    command = ddpm_command(Path("codec_0.ckpt"), *RUN, *overrides)
    result = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a diffusion run of four steps that is told reports and labels, beside its cohort."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "cohort").mkdir()
    rows = ["patient,ct,label,report,split"]
    for split, seeds in SPLITS.items():
        for seed in seeds:
            phantom = make_phantom(seed, (16, 16, 16))
            write_nifti(folder / "cohort" / f"p{seed}.nii.gz", Volume(phantom.hu, phantom.affine, source="test"))
            rows.append(f"p{seed},p{seed}.nii.gz,{seed % 2},the {seed}th report,{split}")
    (folder / "cohort" / "pairs.csv").write_text("\n".join(rows) + "\n")
    saved_codec(folder)
    train(folder)
    return folder


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    """``script(module, *flags, check=exit code)`` in this process, in another folder than the training's."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    def call(module: ModuleType, *flags: object, check: int = 0) -> subprocess.CompletedProcess[str]:
        return call_main(module, *flags, check=check, monkeypatch=monkeypatch, capsys=capsys)

    return call


def report_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "report.json").read_text())


@pytest.mark.slow
def test_what_is_told_beside_the_radiograph_is_recorded_and_changes_the_volumes(
    trained: Path, script: Script, tmp_path: Path
) -> None:
    flags = ("--run", trained / "run", "--steps", 2, "--pictures", 0)
    found = {}
    for name, tell in (("alone", ()), ("label", ("--tell", "label")), ("both", ("--tell", "label", "report"))):
        result = script(xray_to_ct, *flags, *tell, "--output", tmp_path / name)
        found[name] = report_of(tmp_path / name)
        assert f"the model is told: {', '.join(found[name]['settings']['told'])};" in result.stdout
    assert {name: report["settings"]["told"] for name, report in found.items()} == {
        "alone": ["radiograph"], "label": ["radiograph", "label"], "both": ["radiograph", "report", "label"],
    }  # fmt: skip
    right, codec = ({str(r["summary"]["scores"][role]) for r in found.values()} for role in ("right", "codec"))
    assert (len(right), len(codec)) == (3, 1)
    refused = script(xray_to_ct, *flags, "--output", tmp_path / "alone", "--tell", "label", check=2)
    assert_one_line_error(refused, "another told")


@pytest.mark.slow
def test_test_patients_are_evaluated_on_demand(trained: Path, script: Script, tmp_path: Path) -> None:
    run = ("--run", trained / "run", "--steps", 2)
    result = script(xray_to_ct, *run, "--split", "test", "--pictures", 0, "--output", tmp_path / "r")
    report = report_of(tmp_path / "r")
    assert (report["settings"]["split"], list(report["patients"])) == ("test", ["p6", "p7", "p8"])
    assert "3 patients of the test set" in result.stdout
    assert {"mean", "linear"} <= set(report["summary"]["scores"])  # fitted on the training patients
    flags, tables = ("--samplers", "ddim", "--resamples", 20, "--output", tmp_path / "samplers.json"), []
    for split in ("validation", "test"):
        script(sampler_table, *run, "--split", split, *flags)
        tables.append(json.loads((tmp_path / "samplers.json").read_text()))
    assert [(table["split"], table["cases"]) for table in tables] == [("validation", 2), ("test", 3)]
    assert tables[0]["rows"][0]["psnr_db"] != tables[1]["rows"][0]["psnr_db"]


@pytest.mark.slow
def test_test_volumes_are_reconstructed_beside_the_held_out_ones(trained: Path, script: Script, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    flags = ("--run", run, "--checkpoint", trained / "codec_0.ckpt")
    script(reconstruct, *flags)
    script(reconstruct, *flags, "--split", "test")
    for folder, split, names in (("sample", "validation", ["p4", "p5"]), ("test", "test", ["p6", "p7", "p8"])):
        metrics = json.loads((run / f"{folder}_reconstructions" / "metrics.json").read_text())
        assert (metrics["split"], list(metrics["volumes"])) == (split, names)

    # a cohort without any
    table, other = trained / "cohort" / "pairs.csv", trained / "cohort" / "without.csv"
    other.write_text(table.read_text().replace(",test", ",train"))
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(table), str(other)))
    for module, more in ((xray_to_ct, ()), (reconstruct, flags[2:])):
        result = script(module, "--run", run, *more, "--split", "test", check=3)
        assert_one_line_error(result, "none of its 9 volumes is of a test patient", "--split test")


@pytest.mark.slow
def test_a_moved_run_resumes_and_its_data_are_found_from_anywhere(
    trained: Path, script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script(xray_to_ct, "--run", trained / "run", "--steps", 1, "--pictures", 0, "--output", tmp_path / "result")
    assert list(report_of(tmp_path / "result")["patients"]) == ["p4", "p5"]
    assert not list(Path.cwd().iterdir())  # nothing was prepared again: the cache is the training's, too
    facts = training_facts({}, trained / "run", None)
    assert (facts["patients of the training"], facts["patients held out from it"]) == (4, 2)
    assert capsys.readouterr().err == ""
    moved = tmp_path / "moved"
    shutil.copytree(trained / "run", moved / "run")
    (moved / "cohort").symlink_to(trained / "cohort")
    shutil.copy(trained / "codec_0.ckpt", moved)
    train(moved, "ckpt_path=last", "training.max_steps=6")
    assert run_config(moved / "run").dataset.csv == str(moved / "cohort" / "pairs.csv")
    assert "resuming from" in (moved / "run" / "logs" / "training.log").read_text()


def patient(channels: int, number: int) -> dict[str, Any]:
    """A patient as `LatentDataset` gives one, with a report and a label."""
    batch = conditions(1, f"report of an embolism, {number}", number)
    hu = torch.full((1, 16, 16, 16), 100 * number - 50, dtype=torch.int16)
    return {
        "hu": hu, "code": torch.zeros(channels, 4, 4, 4), "affine": torch.eye(4, dtype=torch.float64),
        "xray": torch.nn.functional.interpolate(batch.xray[0], (32, 32)), "xray_present": batch.xray_present[0],
        "ray_grid": batch.ray_grid[0], "label": batch.label[0], "text": batch.text[0], "name": f"p{number}",
        "skipped": [],
    }  # fmt: skip


def test_report_and_label_reach_the_model_where_they_are_named_alone() -> None:
    """A model of 16×16×16 voxels that hears both; noise and radiographs are the same throughout."""
    codec = tiny_codec()
    generator = Generator(moved_network(conditioner={"label": True, "text": "bytes"}), codec)
    patients = [patient(codec.channels, number) for number in range(2)]

    def volumes(*tell: str) -> dict[str, np.ndarray]:
        held_out = HeldOut(generator, None, Path(), "", tell=tell)  # type: ignore[arg-type]
        held_out.__dict__.update(cases=patients, views=("frontal",))
        drawn = xray_to_ct.evaluate_case(held_out, 0, 1, Sampling(steps=1), 1)
        return drawn["volumes"] | {"mirrored": drawn["mirrored"]}

    alone = volumes()
    for tell in (("report",), ("label",)):
        more = volumes(*tell)
        for role in ("right", "shuffled", "mirrored"):
            assert not np.array_equal(more[role], alone[role]), (tell, role)
        for role in ("unconditional", "codec"):
            assert np.array_equal(more[role], alone[role])
    patients[0] |= {"text": "", "label": torch.tensor(UNKNOWN_LABEL)}
    nobody = volumes()
    assert all(np.array_equal(nobody[role], alone[role]) for role in alone)


def test_only_what_is_named_is_told() -> None:
    batch = conditions(1, "large saddle embolus", 0)
    for tell, label, text in (
        ((), UNKNOWN_LABEL, ""), (("label",), 1, ""), (("report",), UNKNOWN_LABEL, "large saddle embolus"),
    ):  # fmt: skip
        known = told(batch, tell)
        assert (known.label.tolist(), known.text) == ([label], (text,))
        assert known.xray is batch.xray
