"""`make demo` at its smallest: from DICOM to the report, killed in the middle, on phantoms and on own volumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

import demo
from dataset.pairs_table import read_pairs
from dataset.phantom import make_phantom
from dataset.volume_io import Volume, write_nifti
from demo import Plan, stages
from errors import InputError
from evaluation.metrics.anatomy import measure
from tests.helpers import ROOT, assert_one_line_error, environment, kill, last_line, wait_for
from vqgan_inference import XRay2CTPA, load_xray

# a whole pipeline is one test's set-up; other tests may share the cores
pytestmark = pytest.mark.timeout(1500)
TINY = [
    *("--size", "32x32x16", "--steps", "2", "--workers", "0"),
    *("--codec", "model.widths=[8,8,16]", "model.encoder_blocks=[1,1,1]", "model.decoder_blocks=[1,1,1]"),
    *("model.strides=[[2,2,2],[1,2,2],[2,1,1]]", "training.max_steps=60", "training.checkpoint_every_n_steps=10"),
    *("callbacks.progress_bar=false", "--ddpm", "model.unet.widths=[16,32]", "model.conditioner.xray_size=32"),
    *("training.max_steps=4", "training.batch_size=4", "validation.samples=1", "callbacks.progress_bar=false"),
]
PHANTOMS = ["--patients", "6", "--held-out", "2"]
LENIENT = ["--min-psnr-db", "-99", "--min-gain-db", "-99"]


def command(*flags: str) -> list[str]:
    return [sys.executable, str(ROOT / "demo.py"), "--output", "out", *TINY, *flags]


@dataclass
class Demo:
    """A folder in which the demo runs."""

    folder: Path

    def run(self, *flags: str, check: int = 0) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(command(*flags), cwd=self.folder, env=self.environment, capture_output=True, text=True,
                                timeout=1200)  # fmt: skip
        assert result.returncode == check, f"{result.stdout[-3000:]}\n{result.stderr[-4000:]}"
        return result

    @property
    def environment(self) -> dict[str, str]:
        return environment(XDG_CACHE_HOME=str(self.folder / "cache"))

    @property
    def out(self) -> Path:
        return self.folder / "out"


def scripts(stdout: str) -> list[str]:
    """Which commands ran, in order."""
    return [Path(line.split()[2]).name for line in stdout.splitlines() if line.startswith("$ ")]


BEFORE = [
    "make_phantom_cohort.py",
    "dicom_to_nifti.py",
    "build_store.py",
    "verify.py",
    "render_drr.py",
    "make_pairs.py",
]
AFTER = ["train_vqgan.py", "reconstruct.py", "encode_latents.py", "train_ddpm.py", "xray_to_ct.py", "export_bundle.py",
         "vqgan_inference.py", "report.py"]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Demo, str]:
    """A demo that was killed in the codec's training and went on: the folder, and what the second run printed."""
    place = Demo(tmp_path_factory.mktemp("demo"))
    process = subprocess.Popen(command(*PHANTOMS), cwd=place.folder, env=place.environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip
    try:
        wait_for(place.out / "codec/checkpoints/last.ckpt", process, timeout_s=600)
    finally:
        kill(process)
    assert not (place.out / "codec/checkpoints/final.ckpt").exists()
    return place, place.run(*PHANTOMS, *LENIENT).stdout


@pytest.mark.slow
def test_a_killed_demo_goes_on_where_it_stopped(finished: tuple[Demo, str]) -> None:
    place, stdout = finished
    assert scripts(stdout) == AFTER
    assert stdout.count("up to date") == len(BEFORE)
    (line,) = [line for line in stdout.splitlines() if "train_vqgan.py" in line]
    assert line.endswith("ckpt_path=last")
    assert "resuming from" in (place.out / "codec/logs/training.log").read_text()


@pytest.mark.slow
def test_everything_a_reader_looks_for_is_there(finished: tuple[Demo, str]) -> None:
    place, stdout = finished
    cases = read_pairs(place.out / "pairs.csv")
    held_out = {case.name for case in cases if case.split == "validation"}
    assert (len(cases), len(held_out)) == (6, 2)
    assert all(case.label is not None for case in cases)
    assert sum("_frontal.png" in str(case.xrays) and "phantom" in str(case.xrays) for case in cases) == 2

    report = json.loads((place.out / "evaluation/report.json").read_text())
    assert set(report["patients"]) == held_out
    assert set(json.loads((place.out / "codec/sample_reconstructions/metrics.json").read_text())["volumes"]) == held_out
    for name in held_out:
        volume = nib.load(next(place.out.glob(f"generated/**/{name}*.nii.gz")))
        assert volume.shape == (32, 32, 16)
        with Image.open(next(place.out.glob(f"generated/**/{name}*.png"))) as picture:
            assert np.asarray(picture).std() > 5
    html = (place.out / "report.html").read_text()
    assert "<html" in html.lower()
    card = (place.out / "final_model.md").read_text()
    for row in (
        "| patients of the training | 4 |",
        "| patients held out from it | 2 |",
        "phantoms, volumes of 32x32x16",
    ):
        assert row in card
    assert "out/codec/sample_reconstructions" in stdout
    assert "report:   out/report.html" in stdout
    for stage in (place.out / "stages").glob("*.json"):
        assert json.loads(stage.read_text())["cpu_s"] > 0
    # T45: no name of a patient left the hospital, but in paths to the hospital's own files
    for path in place.out.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.suffix in (".json", ".csv", ".html", ".yaml", ".md"):
            inside = path.relative_to(place.out).parts[0]
            if inside not in ("hospital", "pairs.csv"):
                assert "phantom_0000" not in path.read_text(errors="replace"), path


@pytest.mark.slow
def test_a_second_run_does_nothing_and_judges_by_its_thresholds(finished: tuple[Demo, str]) -> None:
    place, _ = finished
    missed = place.run(*PHANTOMS, "--min-psnr-db", "90", "--min-gain-db", "-99", check=1)
    assert scripts(missed.stdout) == []
    assert missed.stdout.count("up to date") == len(BEFORE + AFTER)
    assert "threshold 90.00, MISSED" in missed.stdout
    assert "threshold -99.00, passed" in missed.stdout
    gain = place.run(*PHANTOMS, "--min-psnr-db", "-99", "--min-gain-db", "90", check=1)
    assert "threshold 90.00, MISSED" in gain.stdout
    stated = place.run(*PHANTOMS, check=1)  # a codec of sixty steps is no codec
    least = OmegaConf.load(ROOT / "config/experiment/demo.yaml").demo
    for threshold in (least.min_psnr_db, least.min_gain_db):
        assert f"threshold {threshold:.2f}" in stated.stdout


@pytest.mark.slow
def test_only_what_depends_on_a_change_runs_again(finished: tuple[Demo, str]) -> None:
    place, _ = finished

    def keys(steps: int) -> dict[str, str]:
        return {stage.name: stage.key for stage in stages(Plan(place.out, None, 6, 2, "32x32x16", steps))}

    before, more = keys(2), keys(3)
    assert {name for name in more if more[name] != before[name]} == {"evaluation", "inference"}
    os.utime(place.out / "ddpm/checkpoints/final.ckpt")
    touched = keys(2)
    assert {name for name in touched if touched[name] != before[name]} == {"evaluation", "bundle", "report"}


@pytest.mark.slow
def test_own_volumes(tmp_path: Path) -> None:
    """A folder of NIfTI goes all the way, is left as it was, and is not judged by what phantoms reach."""
    place = Demo(tmp_path)
    data = tmp_path / "my data"
    data.mkdir()
    for seed in range(3):
        phantom = make_phantom(seed, (20, 36, 36), (17.0, 12.0, 12.0))
        write_nifti(data / f"case {seed}.nii.gz", Volume(phantom.hu, phantom.affine))
    before = sorted(data.iterdir())
    result = place.run("--data", "my data")
    assert scripts(result.stdout) == BEFORE[2:] + AFTER
    assert result.stdout.count("not judged") == 2
    assert sorted(data.iterdir()) == before
    cases = read_pairs(place.out / "pairs.csv")
    assert {case.patient for case in cases} == {f"case {seed}" for seed in range(3)}
    assert sum(case.split == "validation" for case in cases) == 2


@pytest.mark.parametrize(
    ("flags", "code", "word"),
    [
        (("--size", "64x64"), 2, "64x64"),
        (("--data", "nowhere"), 3, "nowhere"),
        (("--data", "empty"), 3, "empty"),
        (("--data", "."), 2, "lies in the folder of data"),
    ],
)
def test_mistakes_are_told_in_one_line(flags: tuple[str, str], code: int, word: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = subprocess.run(command(*flags), cwd=tmp_path, env=environment(), capture_output=True, text=True,
                            timeout=300)  # fmt: skip
    assert result.returncode == code, result.stderr
    assert_one_line_error(result)
    assert word in result.stderr


def test_sigterm_is_told_in_one_line(tmp_path: Path) -> None:
    process = subprocess.Popen(command(*PHANTOMS), cwd=tmp_path, env=environment(), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip
    wait_for(tmp_path / "out/stages/cohort.json", process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "same command goes on" in last_line(subprocess.CompletedProcess([], 143, out, err))


def test_the_data_decide_where_the_pipeline_begins(tmp_path: Path) -> None:
    def names(data: Path | None) -> list[str]:
        plan = Plan(tmp_path / "out", data, 4, 2, "64x64x32", 2)
        return [stage.name for stage in demo.preparation(plan)]

    (tmp_path / "dicom").mkdir()
    (tmp_path / "dicom/IM1").touch()
    (tmp_path / "nifti/deep").mkdir(parents=True)
    (tmp_path / "nifti/deep/a.NII.GZ").touch()
    rest = ["volumes", "verify", "drr", "pairs"]
    assert names(None) == ["cohort", "nifti", *rest]
    assert names(tmp_path / "dicom") == ["nifti", *rest]
    assert names(tmp_path / "nifti") == rest
    (tmp_path / "nifti/patients.csv").touch()
    *_, pairs = demo.preparation(Plan(tmp_path / "out", tmp_path / "nifti", 4, 2, "64x64x32", 2))
    assert str(tmp_path / "nifti/patients.csv") in pairs.arguments
    with pytest.raises(InputError, match="no such folder"):
        names(tmp_path / "gone")


def test_radiographs_outside_the_data_count_as_inputs(tmp_path: Path) -> None:
    """Those that a table of patients names, and those that the links of held-out ones lead to."""
    data, outside, held_out = tmp_path / "nifti", tmp_path / "pictures/a.png", tmp_path / "out/held_out_xrays"
    for folder in (data, outside.parent, held_out):
        folder.mkdir(parents=True)
    for path in (data / "a.nii.gz", outside, tmp_path / "out/final_model.ckpt"):
        path.write_text("one")
    (data / "patients.csv").write_text("patient,xray\na,../pictures/a.png\nb,\n")
    (held_out / "a.png").symlink_to(outside)
    plan = Plan(tmp_path / "out", data, 4, 2, "64x64x32", 2)

    def keys() -> dict[str, str]:
        return {stage.name: stage.key for stage in [*demo.preparation(plan), *demo.judgement(plan)]}

    before = keys()
    outside.write_text("another")
    after = keys()
    assert {name for name in after if after[name] != before[name]} == {"pairs", "inference"}
    (data / "patients.csv").write_text("no table")
    assert keys()  # the stage says what is wrong


def test_figures_that_are_no_numbers_miss_their_thresholds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan(tmp_path, None, 4, 2, "64x64x32", 2)
    nothing = {"estimate": None, "low": None, "high": None, "n": 0}
    for name, content in (
        ("codec/sample_reconstructions/metrics.json", {"mean": {"psnr_db": None}}),
        ("evaluation/report.json", {"summary": {"gains": {"shuffled": {"psnr_body_db": nothing}}}}),
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(json.dumps(content))
    assert not demo.verdict(plan, 20.0, None)
    assert not demo.verdict(plan, None, 0.0)
    assert "nan" in capsys.readouterr().out


@pytest.mark.slow
def test_volumes_from_the_bundle_are_chests_of_their_radiographs(finished: tuple[Demo, str]) -> None:
    """Two radiographs give two volumes, one seed the same one, and lungs take a share of the body that lungs take."""
    place, _ = finished
    model = XRay2CTPA.load_checkpoint(place.out / "final_model.ckpt", "cpu")
    first, second = sorted((place.out / "held_out_xrays").glob("*.png"))[:2]
    volumes = [model.generate(load_xray(path), steps=2, seed=5) for path in (first, second)]
    assert not np.array_equal(volumes[0].hu, volumes[1].hu)
    assert np.array_equal(model.generate(load_xray(first), steps=2, seed=5).hu, volumes[0].hu)
    for volume in volumes:
        sizes = measure(volume.hu, volume.affine)
        assert 0.05 < sizes["lung_ml"] / sizes["body_ml"] < 0.7
