"""evaluation/clinical.py from the command line, on the smallest diffusion run that has patients with and without PE."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest

from ddpm.classifier.network import ClassifierConfig
from tests.ddpm.tiny import ddpm_command, saved_codec
from tests.evaluation.test_clinical_judges import SMALL, saved_judge
from tests.helpers import ROOT, assert_one_line_error, environment
from tests.in_process import call_main

pytestmark = pytest.mark.slow
SCRIPT = "evaluation/clinical.py"
# of these phantoms 2, 8 and 11 have an embolism
HELD_OUT = [f"phantom_{number:05d}" for number in (0, 1, 2, 4, 8, 11)]
# of the fitted phantoms of 16×16×16 voxels
GRID = replace(SMALL, size_dhw=(16, 16, 16), spacing_low_mm=(15.0, 20.0, 20.0), spacing_high_mm=(23.0, 29.0, 29.0))
XRAY = ClassifierConfig("xray", widths=(4, 8), xray_size=32)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A diffusion run of four steps with six held-out patients, and classifiers that nobody trained."""
    folder = tmp_path_factory.mktemp("run")
    overrides = [
        "training.max_steps=4",
        "training.batch_size=1",
        "dataset.n_patients=12",
        f"dataset.validation=[{','.join(HELD_OUT)}]",
        f"dataset.cache_dir={folder / 'cache'}",
        f"output_dir={folder / 'run'}",
    ]
    command = ddpm_command(saved_codec(folder), *overrides)
    result = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    saved_judge(folder / "run" / "volume.ckpt", GRID)
    saved_judge(folder / "run" / "xray.ckpt", XRAY)
    return folder / "run"


@pytest.fixture
def clinical(run, monkeypatch, capsys, tmp_path):
    """``clinical(*flags, check=exit code)`` in this process, into ``tmp_path/result``."""
    from evaluation import clinical as script

    def call(*flags, check=0, classifier=run / "volume.ckpt"):
        given = ["--run", run, "--classifier", classifier, "--output", tmp_path / "result", "--steps", 1, *flags]
        return call_main(script, *given, check=check, monkeypatch=monkeypatch, capsys=capsys)

    return call


def test_figures_tables_and_resumption(run, tmp_path):
    output = tmp_path / "result"
    flags = [
        "--run", run, "--classifier", run / "volume.ckpt", "--xray-classifier", run / "xray.ckpt", "--steps", 2,
        "--output", output,
    ]  # fmt: skip

    def script(*arguments, check=0):
        command = [sys.executable, str(ROOT / SCRIPT), *map(str, arguments)]
        result = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=600)
        assert result.returncode == check, f"{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
        return result

    first = script(*flags)
    report = json.loads((output / "report.json").read_text())
    summary = report["summary"]
    assert set(report["patients"]) == set(HELD_OUT)
    assert (summary["cases"], summary["with_embolism"]) == (6, 3)
    assert set(summary["auroc"]) == {"real", "codec", "generated", "shuffled", "xray"}
    assert all(area["n"] == 6 and 0 <= area["low"] <= area["high"] <= 1 for area in summary["auroc"].values())
    assert len(summary["delong"]) == 10
    scores = {name: entry["scores"] for name, entry in report["patients"].items()}
    assert len({entry["generated"] for entry in scores.values()}) == 6  # each patient has a volume of its own
    assert summary["dice"]["phantom"]["real"]["body"]["estimate"] > 0.8
    assert summary["dice"]["phantom"]["codec"]["body"]["estimate"] < 0.8  # this codec was never trained
    assert summary["lesions"]["patients_with_embolism"] == 3
    assert summary["frechet"]["features"] == "features of the project's own trained PE classifier"
    assert all(value["frechet"] > 0 for value in summary["frechet"]["by_role"].values())
    assert "the radiograph alone" in first.stdout
    assert "features of the project's own trained PE classifier" in first.stdout

    # interrupted: a record is missing, another was cut, of a third the features were; only they are done again
    (output / "cases" / f"{HELD_OUT[0]}.json").unlink()
    cut = output / "cases" / f"{HELD_OUT[1]}.json"
    cut.write_text(cut.read_text()[:50])
    features = output / "cases" / f"{HELD_OUT[2]}.npz"
    features.write_bytes(features.read_bytes()[:999])
    again = script(*flags)
    assert again.stdout.count("log-odds real") == 3
    assert json.loads((output / "report.json").read_text()) == report

    before = (output / "report.json").read_bytes()
    refused = script(*flags, "--seed", 1, check=2)
    assert_one_line_error(refused, str(output), "another seed", "--output")
    assert (output / "report.json").read_bytes() == before


def test_features_by_a_package_and_no_radiograph_classifier(clinical, tmp_path, monkeypatch):
    (tmp_path / "slice_means.py").write_text(
        "def network():\n    return lambda x: x.flatten(1)[:, ::997][:, :4].double()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    result = clinical("--features", "slice_means:network")
    summary = json.loads((tmp_path / "result" / "report.json").read_text())["summary"]
    assert summary["frechet"]["features"] == "slice_means:network"
    assert "xray" not in summary["auroc"]
    assert all(math.isfinite(value["frechet"]) for value in summary["frechet"]["by_role"].values())
    assert "slice_means:network" in result.stdout


def test_what_does_not_fit_is_told_in_one_line(clinical, run, tmp_path):
    def judge(name, config=GRID, **options):
        return saved_judge(tmp_path / name, config, **options)

    fine = replace(GRID, size_dhw=(32, 16, 16))
    assert_one_line_error(clinical(classifier=judge("a.ckpt", fine), check=3), "a.ckpt", "[32, 16, 16]")
    coarse = replace(GRID, spacing_low_mm=(2.0, 1.0, 1.0), spacing_high_mm=(2.0, 1.0, 1.0))
    assert_one_line_error(clinical(classifier=judge("b.ckpt", coarse), check=3), "b.ckpt", "2×1×1")
    window = replace(GRID, hu_max=500.0)
    assert_one_line_error(clinical(classifier=judge("c.ckpt", window), check=2), "c.ckpt", "HU window")
    leak = judge("d.ckpt", trained_on=(HELD_OUT[3],))
    assert_one_line_error(clinical(classifier=leak, check=3), "d.ckpt", "1 of 6 held-out patients", HELD_OUT[3])
    seen = judge("e.ckpt", XRAY, trained_on=(HELD_OUT[0],))
    assert_one_line_error(clinical("--xray-classifier", seen, check=3), "e.ckpt", "1 of 6")
    pictures = run / "xray.ckpt"
    assert_one_line_error(clinical(classifier=pictures, check=3), "xray.ckpt", "of radiographs")
    assert_one_line_error(clinical("--xray-classifier", run / "volume.ckpt", check=3), "volume.ckpt", "of volumes")
    latents = replace(GRID, input="latent", in_channels=8)
    other = judge("f.ckpt", latents, codec_hash="0" * 64)
    assert_one_line_error(clinical(classifier=other, check=3), "f.ckpt", "not the codec")
    assert_one_line_error(clinical(classifier=run / "codec.ckpt", check=3), "codec.ckpt", "no checkpoint of a PE")
    assert not (tmp_path / "result").exists()


def test_too_few_cases_and_bad_arguments_are_told_in_one_line(clinical, run, tmp_path):
    assert_one_line_error(clinical("--cases", 3, check=2), "--cases 3", "4 or more")
    few = clinical("--cases", 4, check=3)  # the first four have one embolism
    assert_one_line_error(few, "of 4 held-out patients 1 with embolism, 3 without", "--cases")
    assert_one_line_error(clinical("--steps", 0, check=2), "--steps 0")
    assert_one_line_error(clinical("--seed", -1, check=2), "--seed -1")
    assert_one_line_error(clinical("--sampler", "guess", check=2), "guess", "ddim")
    assert_one_line_error(clinical("--features", "no_such_package:net", check=2), "no_such_package", "install")
    assert_one_line_error(clinical("--run", tmp_path / "none", check=3), str(tmp_path / "none"), "--run")


def test_t06_a_truncated_classifier_is_told_in_one_line(clinical, run, tmp_path):
    whole = (run / "volume.ckpt").read_bytes()
    for share in (0.25, 0.75):
        (tmp_path / "cut.ckpt").write_bytes(whole[: int(share * len(whole))])
        assert_one_line_error(clinical(classifier=tmp_path / "cut.ckpt", check=3), "cut.ckpt")
    assert_one_line_error(clinical(classifier=tmp_path / "none.ckpt", check=3), "none.ckpt")
