"""From the entry scripts to pictures and figures, on phantoms and on real CT."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from benchmarks.memory import peak_rss_of
from benchmarks.vqgan import Prepare, prepare_peak, prepare_whole_peak
from tests.helpers import BASELINE, PATCHWISE, REAL_DATA, ROOT, environment, last_line, run
from vq_gan_3d.checkpointing import load_checkpoint

REAL_CT = REAL_DATA / "ct_2mm"
needs_real_ct = pytest.mark.skipif(
    not REAL_CT.is_dir(), reason="no real CT volumes beside the repository (shared/data)"
)


def reconstruct(run_dir: Path, check: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "evaluation/reconstruct.py"), "--run", str(run_dir)]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert result.returncode == check, result.stderr[-3000:]
    return result


def losses(run_dir: Path) -> list[float]:
    with (run_dir / "logs/train.csv").open() as file:
        return [float(row["l1"]) for row in csv.DictReader(file)]


def test_train_and_reconstruct_phantoms(tmp_path: Path) -> None:
    """The thin road: training lowers the loss, held-out volumes come back as NIfTI, PNG and figures."""
    options = [
        "training.max_steps=60",
        "training.learning_rate=0.003",
        "logger.every_n_steps=1",
    ]
    run(BASELINE, *options, "model.discriminator_iter_start=999", "+demo.min_psnr_db=90", cwd=tmp_path)
    run_dir = tmp_path / "outputs"
    curve = losses(run_dir)
    assert np.mean(curve[-10:]) < 0.6 * np.mean(curve[:10])

    result = reconstruct(run_dir, check=1)  # no codec reaches 90 dB: the demo's threshold must bite
    assert "MISSED" in result.stdout
    report = json.loads((run_dir / "sample_reconstructions/metrics.json").read_text())
    (name,) = report["volumes"]
    assert {"psnr_db", "psnr_slice_db", "psnr_pe_window_db", "ssim", "mae_hu", "bias_hu"} <= set(report["mean"])
    assert 5 < report["mean"]["psnr_db"] < 60
    image = nib.load(run_dir / f"sample_reconstructions/{name}.nii.gz")
    assert image.shape == (32, 32, 16)
    assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
    assert image.get_data_dtype() == np.int16
    with Image.open(run_dir / f"sample_reconstructions/{name}.png") as panel:
        assert len(np.unique(np.asarray(panel))) > 20


@pytest.mark.slow
def test_patchwise_sibling_trains_on_native_grids(tmp_path: Path) -> None:
    options = ["dataset.size=null", "dataset.phantom_size=[24,40,36]", "dataset.patch_size=[16,32,32]"]
    run(PATCHWISE, *options, "training.max_steps=3", cwd=tmp_path)
    assert (tmp_path / "outputs/checkpoints/final.ckpt").is_file()
    refused = run(PATCHWISE, "dataset.size=null", "dataset.phantom_size=null", "output_dir=no", cwd=tmp_path, check=2)
    assert "dataset.phantom_size" in last_line(refused)


@needs_real_ct
@pytest.mark.slow
def test_real_ct_trains_and_resumes(tmp_path: Path) -> None:
    """Real thoraces by random patches: the loss falls, a resumed run goes on, the held-out patient comes back."""
    folder = tmp_path / "ct"
    folder.mkdir()
    for name in ("lidc_0314", "covidctmd_P001", "nsclcradiogenomics_R01-001"):
        shutil.copy(REAL_CT / f"{name}.nii.gz", folder)
    options = [
        "dataset=nifti",
        f"dataset.root_dir={folder}",
        "dataset.size=[48,48,48]",
        "dataset.patch_size=[32,32,32]",
        "dataset.patches_per_volume=30",
        "dataset.validation=[lidc_0314]",
        f"dataset.cache_dir={tmp_path / 'cache'}",
        "training.learning_rate=0.003",
        "logger.every_n_steps=1",
        "model.discriminator_iter_start=999",
    ]
    run(BASELINE, *options, "training.max_steps=60", cwd=tmp_path)
    run(BASELINE, *options, "training.max_steps=80", "ckpt_path=last", cwd=tmp_path)
    curve = losses(tmp_path / "outputs")
    assert len(curve) == 80
    assert np.mean(curve[-15:]) < 0.7 * np.mean(curve[:15])
    reconstruct(tmp_path / "outputs")
    restored = nib.load(tmp_path / "outputs/sample_reconstructions/lidc_0314.nii.gz").get_fdata()
    assert restored.shape == (48, 48, 48)
    assert restored.std() > 200  # a thorax has air and tissue; a collapsed codec has neither


@pytest.mark.slow
def test_compiled_training_writes_the_same_kind_of_checkpoint(tmp_path: Path) -> None:
    """``hardware.compile``: the discriminators start at step 2, and names of weights stay those of the plain codec."""
    steps = ["training.max_steps=4", "logger.every_n_steps=1"]
    run(BASELINE, *steps, "hardware.compile=true", "output_dir=compiled", cwd=tmp_path)
    run(BASELINE, *steps, "output_dir=plain", cwd=tmp_path)
    with (tmp_path / "compiled/logs/train.csv").open() as file:
        assert [row["adaptive_weight"] != "" for row in csv.DictReader(file)] == [False, False, True, True]
    compiled, plain = (load_checkpoint(tmp_path / name / "checkpoints/final.ckpt") for name in ("compiled", "plain"))
    assert compiled["state_dict"].keys() == plain["state_dict"].keys()
    name = "codec.decoder.head.weight"
    assert not compiled["current_model_state"][name].equal(compiled["state_dict"][name])  # trained, so off its average


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("prepare", [prepare_peak, prepare_whole_peak])
def test_a_training_step_takes_at_most_500_bytes_per_voxel(prepare: Prepare) -> None:
    """At 128³ in bf16 with block checkpointing, above weights, gradients and optimizer state."""
    assert 50 < peak_rss_of(prepare, "cpu", 1, 128, 128, 128) / 128**3 <= 500


@pytest.mark.slow
def test_the_benchmark_reports_what_others_read(tmp_path: Path) -> None:
    report = tmp_path / "bench.json"
    command = [sys.executable, str(ROOT / "benchmarks/vqgan.py"), "--quick", "--json", str(report)]
    subprocess.run(command, check=True, capture_output=True, timeout=840)
    content = json.loads(report.read_text())
    assert {"machine", "date", "versions", "rows"} <= set(content)
    rows = {row["what"]: row for row in content["rows"]}
    for start in ("step 64³", "peak bytes per voxel", "parameters: generator", "parameters"):
        assert any(what.startswith(start) for what in rows), start
    assert 20 <= rows["parameters: generator"]["value"] <= rows["parameters"]["value"] <= 40
    assert rows["reference: MFLOP per voxel and step"]["value"] == pytest.approx(20.6, rel=0.05)
