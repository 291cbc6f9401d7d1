"""The evaluation scripts of the diffusion model, from the command line, on the smallest run that goes all the way."""

import hashlib
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.intensity import HUWindow
from dataset.projection import VIEWS
from ddpm.classifier.network import ClassifierConfig
from ddpm.conditions import UNKNOWN_LABEL, ConditionBatch
from ddpm.patient import joined
from evaluation.controls import mirrored, with_xrays_of, without_conditions
from evaluation.held_out import HeldOut, LinearMap, open_run
from tests.ddpm.tiny import ddpm_command, saved_codec
from tests.evaluation.test_clinical_judges import saved_judge
from tests.helpers import ROOT, assert_one_line_error, environment

XRAY_TO_CT, SAMPLER_TABLE = "evaluation/xray_to_ct.py", "evaluation/sampler_table.py"


def evaluate(script, *arguments, cwd, check=0):
    result = subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == check, f"exit {result.returncode}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A diffusion run of four steps with four held-out patients."""
    folder = tmp_path_factory.mktemp("run")
    overrides = [
        "training.max_steps=4",
        "dataset.n_patients=8",
        "dataset.validation_fraction=0.5",
        f"dataset.cache_dir={folder / 'cache'}",
        f"output_dir={folder / 'run'}",
    ]
    command = ddpm_command(saved_codec(folder), *overrides)
    result = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    return folder / "run"


@pytest.mark.slow
def test_figures_pictures_and_resumption(run, tmp_path):
    output = tmp_path / "result"
    flags = ("--run", run, "--output", output, "--steps", 2, "--samples", 2, "--pictures", 1)
    first = evaluate(XRAY_TO_CT, *flags, cwd=tmp_path)
    report = json.loads((output / "report.json").read_text())
    patients = report["patients"]
    assert len(patients) >= 2
    assert set(patients) == set(report["settings"]["cases"])
    assert all(entry["xray_of_shuffled"] != name for name, entry in patients.items())
    roles = {"right", "right_mean", "shuffled", "unconditional", "mean", "linear", "codec"}
    assert set(report["summary"]["scores"]) == roles
    # the codec was never trained, the mean of the training phantoms is a chest
    assert report["summary"]["scores"]["mean"]["psnr_body_db"]["low"] > 15
    assert report["summary"]["scores"]["codec"]["psnr_body_db"]["high"] < 12
    assert math.isfinite(report["summary"]["gains"]["linear"]["psnr_body_db"]["estimate"])
    assert {"chirality", "mirror", "cone", "diversity", "retrieval", "bars"} <= set(report["summary"])
    assert set(report["summary"]["cone"]) == {"ncc", "ncc_shuffled"}
    assert report["summary"]["retrieval"]["nearest"]["n"] == len(patients)
    assert 1 <= report["summary"]["retrieval"]["rank"]["estimate"] <= len(patients)
    for heading in ("PSNR slice dB", "bias HU", "whether the side follows the X-ray"):
        assert heading in first.stdout
    assert "MISSED" in first.stdout
    picture = np.asarray(Image.open(next(output.glob("*.png"))))
    assert picture.std() > 10
    assert len(list(output.glob("*.png"))) == 1

    # interrupted: one patient is missing, one record was cut; only they are done again
    records = sorted((output / "cases").glob("*.json"))
    records[0].unlink()
    records[1].write_text(records[1].read_text()[:100])
    again = evaluate(XRAY_TO_CT, *flags, cwd=tmp_path)
    assert again.stdout.count("PSNR in the body, dB: right") == 2
    assert json.loads((output / "report.json").read_text()) == report

    # other settings are not mixed in, and what is there stays as it was
    before = (output / "report.json").read_bytes()
    refused = evaluate(XRAY_TO_CT, *flags, "--guidance", 2, cwd=tmp_path, check=2)
    assert_one_line_error(refused, str(output), "guidance", "--output")
    assert (output / "report.json").read_bytes() == before


@pytest.mark.slow
def test_patients_of_the_training_can_be_looked_at(run, tmp_path):
    output = tmp_path / "remembered"
    flags = ("--run", run, "--output", output, "--steps", 2, "--pictures", 0, "--split", "training", "--cases", 3)
    result = evaluate(XRAY_TO_CT, *flags, cwd=tmp_path)
    report = json.loads((output / "report.json").read_text())
    held_out = {case.name for case in open_run(run, None, None, None, "cpu").cases.cases}
    assert len(report["patients"]) == 3
    assert not held_out & set(report["patients"])
    # the mean and the regression were fitted on these patients
    assert not {"mean", "linear"} & set(report["summary"]["scores"])
    assert "retrieval" in report["summary"]
    assert "which the model has seen" in result.stdout


@pytest.mark.slow
def test_a_classifier_of_latents_may_guide(run, tmp_path):
    config = ClassifierConfig("latent", in_channels=4, widths=(4, 8), strides=((1, 1, 1), (1, 2, 2)), blocks=(1, 1))
    codec = open_run(run, None, None, 1, "cpu").generator.codec.content_hash
    guide = saved_judge(tmp_path / "guide.ckpt", config, codec)
    output = tmp_path / "guided"
    flags = ("--run", run, "--steps", 2, "--pictures", 0, "--cases", 2, "--classifier", guide)
    evaluate(XRAY_TO_CT, *flags, "--output", output, "--classifier-scale", 1000, cwd=tmp_path)
    evaluate(XRAY_TO_CT, *flags, "--output", tmp_path / "free", "--classifier-scale", 0, cwd=tmp_path)
    guided, free = (json.loads((folder / "report.json").read_text()) for folder in (output, tmp_path / "free"))
    assert guided["settings"]["classifier"] == hashlib.sha256(guide.read_bytes()).hexdigest()
    assert guided["summary"]["scores"]["right"] != free["summary"]["scores"]["right"]
    assert guided["summary"]["scores"]["codec"] == free["summary"]["scores"]["codec"]
    refused = evaluate(XRAY_TO_CT, *flags[:-2], "--output", output, cwd=tmp_path, check=2)
    assert_one_line_error(refused, "classifier_scale")
    other = saved_judge(tmp_path / "other.ckpt", config, "0" * 64)
    wrong = evaluate(XRAY_TO_CT, *flags[:-1], other, "--output", tmp_path / "no", cwd=tmp_path, check=3)
    assert_one_line_error(wrong, "other.ckpt")


@pytest.mark.slow
def test_table_of_samplers(run, tmp_path):
    output = tmp_path / "table.json"
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 9, stride=9), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    torch.jit.trace(network, torch.zeros(2, 1, 224, 224)).save(str(tmp_path / "net.pt"))
    flags = ("--run", run, "--output", output, "--cases", 2, "--steps", 2, 1, "--resamples", 20)
    flags = (*flags, "--samplers", "ddim", "heun")
    first = evaluate(SAMPLER_TABLE, *flags, cwd=tmp_path)
    report = json.loads(output.read_text())
    assert [(row["sampler"], row["steps"], row["passes"]) for row in report["rows"]] == [
        ("codec", 0, 0),
        ("ddim", 1, 1),
        ("ddim", 2, 2),
        ("heun", 1, 1),
        ("heun", 2, 3),
    ]
    assert all(row["seconds"] > 0 and row["frechet"] > 0 for row in report["rows"])
    assert all(row["frechet_low"] <= row["frechet"] <= row["frechet_high"] for row in report["rows"])
    assert "ddim: no verdict, no run of 250 steps: add it to --steps" in first.stdout
    assert report["features"] == "3-D, the run's own codec"
    assert "s/volume" in first.stdout
    again = evaluate(SAMPLER_TABLE, *flags, cwd=tmp_path)  # nothing is measured twice
    assert json.loads(output.read_text()) == report
    assert " dB, " not in again.stdout
    evaluate(SAMPLER_TABLE, *flags[:-1], "--features", tmp_path / "net.pt", cwd=tmp_path)
    report = json.loads(output.read_text())
    assert report["features"] == "2.5-D, TorchScript net.pt"
    assert {"frechet_axial", "frechet_coronal", "frechet_sagittal"} <= set(report["rows"][0])


@pytest.mark.slow
def test_t06_a_truncated_checkpoint_is_told_in_one_line(run, tmp_path):
    damaged = tmp_path / "damaged.ckpt"
    whole = (run / "checkpoints" / "final.ckpt").read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    result = evaluate(XRAY_TO_CT, "--run", run, "--checkpoint", damaged, cwd=tmp_path, check=3)
    assert_one_line_error(result, str(damaged))


@pytest.mark.slow
def test_another_codec_is_refused(run, tmp_path):
    other = saved_codec(tmp_path, seed=1)
    result = evaluate(XRAY_TO_CT, "--run", run, "--codec", other, cwd=tmp_path, check=3)
    assert_one_line_error(result, "codec")


@pytest.mark.slow
def test_bad_arguments_are_told_in_one_line(run, tmp_path):
    missing = evaluate(XRAY_TO_CT, "--run", tmp_path / "none", cwd=tmp_path, check=3)
    assert_one_line_error(missing, str(tmp_path / "none"), "--run")
    assert_one_line_error(evaluate(XRAY_TO_CT, "--run", run, "--steps", 0, cwd=tmp_path, check=2), "--steps 0")
    unknown = evaluate(SAMPLER_TABLE, "--run", run, "--samplers", "guess", cwd=tmp_path, check=2)
    assert_one_line_error(unknown, "guess", "ddim")
    assert not (run / "xray_to_ct").exists()


def conditions(seed):
    """Two views of one patient, on a grid of 2×3×4 cells."""
    rng = torch.Generator().manual_seed(seed)
    return ConditionBatch(
        torch.rand((1, 2, 1, 8, 8), generator=rng),
        torch.ones(1, 2, dtype=torch.bool),
        2 * torch.rand((1, 2, 2, 3, 4, 2), generator=rng) - 1,
        torch.tensor([seed]),
        (f"report {seed}",),
    )


def test_a_mirrored_patient_sees_each_cell_on_the_other_side():
    batch = conditions(0)
    turned = mirrored(batch, VIEWS)
    sample = torch.nn.functional.grid_sample
    features = sample(batch.xray[:, 0], batch.ray_grid[:, 0].flatten(1, 2), align_corners=False)
    other = sample(turned.xray[:, 0], turned.ray_grid[:, 0].flatten(1, 2), align_corners=False)
    assert torch.allclose(other, features.flip(-1), atol=1e-6)
    assert turned.xray_present.tolist() == [[True, False]]
    twice = mirrored(replace(turned, xray_present=batch.xray_present), VIEWS)
    assert torch.equal(twice.xray, batch.xray)
    assert torch.equal(twice.ray_grid, batch.ray_grid)


def test_controls_change_what_they_say_and_nothing_else():
    own, other = conditions(0), conditions(1)
    shuffled = with_xrays_of(own, other)
    assert torch.equal(shuffled.xray, other.xray)
    assert torch.equal(shuffled.ray_grid, other.ray_grid)
    assert shuffled.text == own.text
    assert torch.equal(shuffled.label, own.label)
    nothing = without_conditions(own)
    assert not nothing.xray.any()
    assert not nothing.xray_present.any()
    assert nothing.label.tolist() == [UNKNOWN_LABEL]
    assert nothing.text == ("",)
    both = joined([own, nothing])
    assert both.xray.shape[0] == both.ray_grid.shape[0] == len(both.text) == 2
    assert torch.equal(both.xray[:1], own.xray)
    assert both.extra is None


def test_the_linear_control_learns_from_training_patients_with_a_radiograph(monkeypatch):
    rng = np.random.default_rng(0)
    shape, slope = (2, 3, 4), rng.normal(0, 20, (5, 24))
    pictures = {"training": [*rng.normal(size=(20, 5)), None], "validation": [*rng.normal(size=(2, 5)), None]}

    def case(picture):  # who has no radiograph has nonsense for a volume
        hu = np.full(24, 1000.0) if picture is None else picture @ slope - 100
        return SimpleNamespace(volume=SimpleNamespace(open=lambda: hu.reshape(shape), affine=np.eye(4)))

    datasets = {split: SimpleNamespace(cases=[case(one) for one in given]) for split, given in pictures.items()}
    generator = SimpleNamespace(codec=SimpleNamespace(window=HUWindow()))
    held_out = HeldOut(generator, SimpleNamespace(datasets=datasets), Path(), "")
    monkeypatch.setattr(HeldOut, "frontal", lambda self, split, number: pictures[split][number])
    linear = LinearMap.fit(held_out, shape)
    assert linear.numbers == tuple(range(20))
    for number in range(2):
        guess = linear.volume(held_out, number, shape)
        assert np.abs(guess - datasets["validation"].cases[number].volume.open()).max() < 0.1
    assert linear.volume(held_out, 2, shape) is None
    pictures["training"][2:] = [None] * 19
    assert LinearMap.fit(held_out, shape) is None
