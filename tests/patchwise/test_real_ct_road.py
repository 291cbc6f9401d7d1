"""Real CT at its native grid: trained, validated, reconstructed and measured by the real commands in turn."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dataset.volume_io import Volume, read_nifti, write_nifti
from tests.helpers import PATCHWISE, REAL_DATA, ROOT, environment, run

NATIVE = REAL_DATA / "ct_native"
TRAIN = ROOT / "patchwise_512x512x604" / "train"
# Where the hearts of the two patients lie, on grids that differ in spacing and depth.
PARTS = {"lidc_0001": slice(60, 84), "lidc_0002": slice(120, 150)}
CHECKPOINT = ("--checkpoint", "outputs/checkpoints/final.ckpt")


def call(cwd: Path, script: str, *arguments: str) -> None:
    command = [sys.executable, str(TRAIN / f"{script}.py"), *CHECKPOINT, *arguments]
    result = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, f"exit {result.returncode}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 60 steps on one patient, the other held out; slabs of 160×160 voxels in plane, around the spine."""
    if not NATIVE.is_dir():
        pytest.skip("no real CT volumes beside the repository (shared/data/ct_native)")
    folder = tmp_path_factory.mktemp("road")
    (folder / "data").mkdir()
    for name, slices in PARTS.items():
        volume = read_nifti(NATIVE / f"{name}.nii.gz")
        start = (slices.start, 176, 176)
        affine = volume.affine.copy()
        affine[:3, 3] += affine[:3, :3] @ start
        part = np.ascontiguousarray(volume.hu[slices, 176:336, 176:336])
        write_nifti(folder / f"data/{name}.nii.gz", Volume(part, affine, orientation=volume.orientation))
    settings = ["experiment=patchwise_cpu", f"dataset.root_dir={folder / 'data'}", "dataset.validation=[lidc_0002]"]
    quick = ["dataset.size=null", "dataset.patch_size=[16,48,48]", "training.max_steps=60", "logger.every_n_steps=1"]
    run(PATCHWISE, *settings, *quick, f"dataset.cache_dir={folder / 'cache'}", cwd=folder)
    return folder


@pytest.mark.slow
def test_the_loss_falls_on_native_patches(trained: Path) -> None:
    with (trained / "outputs/logs/train.csv").open() as handle:
        losses = [float(row["l1"]) for row in csv.DictReader(handle)]
    assert len(losses) == 60
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])


@pytest.mark.slow
def test_held_out_patients_are_validated_reconstructed_and_measured(trained: Path) -> None:
    """Without naming data the two scripts take the patient that was held out, and agree with the file they wrote."""
    call(trained, "validate_patches", "--data_dir", "data/lidc_0002.nii.gz", "--output", "patches")
    call(trained, "generate_samples", "--output", "samples", "--video_frames", "2")
    call(trained, "compute_metrics", "--output", "report.json")
    report = json.loads((trained / "report.json").read_text())
    (case,) = report["cases"]
    assert case["name"] == "lidc_0002"
    source, restored = (read_nifti(trained / part / "lidc_0002.nii.gz") for part in ("data", "samples"))
    assert np.array_equal(restored.affine, source.affine)
    clipped = source.hu.clip(-1000, 1000).astype(float)
    error = np.abs(restored.hu - clipped)
    assert case["mae_hu"] == pytest.approx(error.mean(), rel=1e-3)
    assert error.mean() < 0.8 * np.abs(clipped - clipped.mean()).mean()  # better than any one grey
    assert np.corrcoef(restored.hu.ravel(), clipped.ravel())[0, 1] > 0.7
    with (trained / "patches/patches.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == tiles_of(source.hu.shape)
    assert {row["name"] for row in rows} == {"lidc_0002"}


def tiles_of(shape: tuple[int, ...]) -> int:
    """How many patches of 16×48×48 with a quarter of overlap cover a volume."""
    counts = (1 + -(-max(0, n - size) // (size * 3 // 4)) for n, size in zip(shape, (16, 48, 48), strict=True))
    return int(np.prod(list(counts)))
