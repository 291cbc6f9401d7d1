"""The evaluation scripts: figures that can be checked, results on the input's grid, one line for bad input."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from dataset.intensity import HUWindow
from dataset.sources import NiftiSource
from dataset.store import write_store
from dataset.volume_io import Volume, read_nifti, write_nifti
from evaluation.metrics.image import volume_metrics
from evaluation.metrics.streamed import SliceStream
from patchwise_512x512x604.evaluation_set import find_cases
from patchwise_512x512x604.options import WEIGHTS
from patchwise_512x512x604.utils.patch_utils import Kind
from tests.helpers import PATCHWISE, REAL_DATA, ROOT, assert_one_line_error, environment, run
from tests.patchwise.conftest import Script, unit_error

WINDOW = HUWindow()
SCRIPTS = ("validate_patches", "generate_samples", "compute_metrics")


def data_option(name: str) -> str:
    return "--test_data" if name == "compute_metrics" else "--data_dir"


@pytest.mark.parametrize("shape", [(97, 20, 24), (37, 20, 24), (9, 20, 24), (50, 8, 24), (1, 12, 12)])
@pytest.mark.parametrize("window", [WINDOW, HUWindow(-1024.0, 600.0), HUWindow(-160.0, 240.0)])
def test_metrics_of_slices_as_they_come_are_those_of_the_volume(shape, window: HUWindow) -> None:
    rng = np.random.default_rng(0)
    original = rng.integers(-1200, 1500, shape).astype(np.int16)
    noisy = np.clip(original + rng.normal(0, 60, shape), -1000, 1000).astype(np.int16)
    expected = volume_metrics(*(window.to_unit(torch.from_numpy(x)) for x in (noisy, original)), window)
    for step in (1, 16, 40):
        stream = SliceStream(shape, window)
        for first in range(0, shape[0], step):
            stream.update(noisy[first : first + step], original[first : first + step])
        assert stream.result() == pytest.approx(expected, rel=1e-5, nan_ok=True)


def test_compute_metrics_reports_cases_and_intervals(script: Script, checkpoint: Path, volumes: Path) -> None:
    result = script(
        "compute_metrics", "--checkpoint", checkpoint, "--test_data", volumes, "--output", "new/metrics_report.json"
    )
    report = json.loads(Path("new/metrics_report.json").read_text())
    assert [row["name"] for row in report["cases"]] == ["case_1", "case_2"]
    assert report["cases"][1]["shape_dhw"] == [26, 40, 36]
    for key, interval in report["aggregate"].items():
        values = [row[key] for row in report["cases"]]
        assert interval["mean"] == pytest.approx(np.mean(values))
        assert min(values) - 1e-9 <= interval["low"] <= interval["high"] <= max(values) + 1e-9
    assert 12 < report["aggregate"]["psnr_db"]["mean"] < 60
    assert 0 < max(row["code_usage"] for row in report["cases"]) <= report["code_usage"] <= 1
    assert 1 < report["code_perplexity"] <= report["n_codes"]
    assert report["aggregate"]["seam_ratio"]["mean"] == 1  # of one tile; of many see test_script_seams
    assert "case_2" in result.stdout
    assert "mean" in result.stdout


def test_blending_and_halo_agree_and_are_told_apart(script: Script, checkpoint: Path, volumes: Path) -> None:
    """Both reconstruct the same volume; small blended tiles lack context at their borders."""
    psnr = {}
    for mode in ("halo", "blend"):
        tile = ("--tile_size", 16, 16, 16) if mode == "blend" else ()
        options = ("--checkpoint", checkpoint, "--test_data", volumes, "--mode", mode, "--output", f"{mode}.json")
        script("compute_metrics", *options, *tile)
        report = json.loads(Path(f"{mode}.json").read_text())
        assert report["mode"] == mode
        psnr[mode] = report["aggregate"]["psnr_db"]["mean"]
    assert psnr["halo"] != psnr["blend"]
    assert psnr["halo"] == pytest.approx(psnr["blend"], abs=1.5)


def test_overlap_and_weights_are_those_of_the_command(script: Script, checkpoint: Path, volumes: Path) -> None:
    assert get_args(Kind) == WEIGHTS
    base = ("--checkpoint", checkpoint, "--test_data", volumes / "case_1.nii.gz", "--output", "report.json")
    base += ("--mode", "blend", "--tile_size", 16, 16, 16)
    reports = []
    for options in ((), ("--overlap", 0.25, "--weights", "linear"), ("--overlap", 0.5), ("--weights", "gaussian")):
        script("compute_metrics", *base, *options)
        reports.append(json.loads(Path("report.json").read_text()))
    figures = [(report["overlap"], report["weights"]) for report in reports]
    assert figures == [(0.25, "linear"), (0.25, "linear"), (0.5, "linear"), (0.25, "gaussian")]
    psnr = [report["cases"][0]["psnr_db"] for report in reports]
    assert psnr[0] == psnr[1]
    assert len(set(psnr)) == 3


def test_a_store_gives_the_figures_of_its_nifti(script: Script, checkpoint: Path, volumes: Path) -> None:
    """Read by slices, by two threads at a time, instead of whole."""
    Path("stores").mkdir()
    for number in (1, 2):
        write_store(f"stores/case_{number}.b2nd", read_nifti(volumes / f"case_{number}.nii.gz"), {})
    rows = {}
    for kind, data in (("nifti", volumes), ("store", Path("stores"))):
        script("compute_metrics", "--checkpoint", checkpoint, "--test_data", data, "--output", f"{kind}.json")
        rows[kind] = json.loads(Path(f"{kind}.json").read_text())["cases"]
    for ours, theirs in zip(rows["store"], rows["nifti"], strict=True):
        assert ours | {"seconds": 0} == theirs | {"seconds": 0}
    script(
        "generate_samples", "--checkpoint", checkpoint, "--data_dir", "stores", "--output", "out", "--video_frames", 0
    )
    assert read_nifti("out/case_2.nii.gz").hu.shape == (26, 40, 36)


def test_a_damaged_store_is_skipped_before_it_is_coded(script: Script, checkpoint: Path, volumes: Path) -> None:
    Path("stores").mkdir()
    for number in (1, 2):
        write_store(f"stores/case_{number}.b2nd", read_nifti(volumes / f"case_{number}.nii.gz"), {})
    content = bytearray(Path("stores/case_1.b2nd").read_bytes())
    content[len(content) // 2] ^= 1
    Path("stores/case_1.b2nd").write_bytes(content)
    result = script("compute_metrics", "--checkpoint", checkpoint, "--test_data", "stores", check=4)
    assert "case_1.b2nd" in result.stderr
    assert [row["name"] for row in json.loads(Path("metrics_report.json").read_text())["cases"]] == ["case_2"]


def test_generate_samples_writes_on_the_grid_of_the_input(script: Script, checkpoint: Path, volumes: Path) -> None:
    script(
        "generate_samples", "--checkpoint", checkpoint, "--data_dir", volumes, "--output", "out", "--video_frames", 4
    )
    assert {path.name for path in Path("out").iterdir()} == {
        f"case_{n}.{kind}" for n in (1, 2) for kind in ("nii.gz", "png", "webp")
    }
    for number in (1, 2):
        ours, theirs = (nib.load(folder / f"case_{number}.nii.gz") for folder in (Path("out"), volumes))
        assert ours.shape == theirs.shape
        assert np.array_equal(ours.affine, theirs.affine)
        assert nib.aff2axcodes(ours.affine) == nib.aff2axcodes(theirs.affine)
        restored, original = ours.get_fdata(), theirs.get_fdata()
        mirrored = [unit_error(np.flip(restored, axis), original) for axis in range(3)]
        assert unit_error(restored, original) < min(mirrored)
        assert np.corrcoef(restored.ravel(), original.ravel())[0, 1] > 0.6
        with Image.open(f"out/case_{number}.webp") as video:
            assert video.n_frames == 4
    script(
        "generate_samples", "--checkpoint", checkpoint, "--data_dir", volumes, "--output", "one", "--num_samples", 1,
        "--video_frames", 0,
    )  # fmt: skip
    assert {path.name for path in Path("one").iterdir()} == {"case_1.nii.gz", "case_1.png"}


def test_validate_patches_says_where(script: Script, checkpoint: Path, volumes: Path) -> None:
    """The tiles of a volume together have the metrics of all its voxels; the worst is the minimum."""
    script("validate_patches", "--checkpoint", checkpoint, "--data_dir", volumes, "--output", "all")
    summary = json.loads(Path("all/validation.json").read_text())
    assert summary["patch_dhw"] == [16, 16, 16]  # of the training
    with Path("all/patches.csv").open() as file:
        rows = list(csv.DictReader(file))
    for volume in summary["volumes"]:
        own = [float(row["psnr_db"]) for row in rows if row["name"] == volume["name"]]
        assert len(own) == volume["patches"] == {"case_1": 2, "case_2": 3}[volume["name"]] * 4 * 4
        assert volume["worst_psnr_db"] == pytest.approx(min(own))
        assert min(own) < volume["psnr_db"] < max(own)
        assert Path(f"all/{volume['name']}_worst.png").is_file()
    script(
        "validate_patches", "--checkpoint", checkpoint, "--data_dir", volumes / "case_1.nii.gz", "--output", "few",
        "--max_patches", 3, "--patch_size", 8, 16, 16,
    )  # fmt: skip
    assert json.loads(Path("few/validation.json").read_text())["volumes"][0]["patches"] == 3


@pytest.mark.parametrize("name", SCRIPTS)
def test_bad_input_is_one_line(script: Script, checkpoint: Path, volumes: Path, tmp_path: Path, name: str) -> None:
    data = data_option(name)
    empty, broken = tmp_path / "empty", tmp_path / "broken.ckpt"
    empty.mkdir()
    broken.write_bytes(checkpoint.read_bytes()[:-100])
    good = ("--checkpoint", checkpoint, data, volumes)
    for arguments, code, words in (
        (("--checkpoint", tmp_path / "no.ckpt", data, volumes), 3, "no.ckpt"),
        (("--checkpoint", broken, data, volumes), 3, "broken.ckpt"),
        (("--checkpoint", checkpoint, data, tmp_path / "nowhere"), 3, "nowhere"),
        (("--checkpoint", checkpoint, data, empty), 3, "empty"),
        ((*good, "--device", "cuda:99"), 2, "cuda:99"),
        ((*good, "--output", f"{broken}/results"), 6, "broken.ckpt"),
    ):
        assert_one_line_error(script(name, *arguments, check=code), words)


def test_bad_settings_are_one_line(script: Script, checkpoint: Path, volumes: Path) -> None:
    for name, options in (
        ("compute_metrics", ("--tile_size", 15, 16, 16)),
        ("compute_metrics", ("--batch_size", 0)),
        ("compute_metrics", ("--overlap", 0.5)),
        ("generate_samples", ("--weights", "cosine")),
        ("compute_metrics", ("--mode", "blend", "--overlap", 1)),
        ("generate_samples", ("--num_samples", 0)),
        ("generate_samples", ("--video_frames", -1)),
        ("validate_patches", ("--patch_size", 3, 16, 16)),
        ("validate_patches", ("--max_patches", 0)),
    ):
        result = script(name, "--checkpoint", checkpoint, data_option(name), volumes, *options, check=2)
        assert_one_line_error(result)
    # without --data_dir the run's own record is needed
    assert_one_line_error(script("generate_samples", "--checkpoint", checkpoint, check=3), "config.yaml", "--data_dir")


@pytest.mark.parametrize("name", SCRIPTS)
def test_one_unreadable_volume_is_skipped_and_all_are_an_error(
    script: Script, checkpoint: Path, volumes: Path, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "good.nii.gz").write_bytes((volumes / "case_1.nii.gz").read_bytes())
    (folder / "bad.nii.gz").write_bytes((volumes / "case_2.nii.gz").read_bytes()[:2000])
    output = "report.json" if name == "compute_metrics" else "out"
    options = ("--checkpoint", checkpoint, data_option(name), folder, "--output", output)
    options += ("--video_frames", "0") if name == "generate_samples" else ()
    result = script(name, *options, check=4)
    assert "bad.nii.gz" in result.stderr
    assert "Traceback" not in result.stderr
    (folder / "good.nii.gz").unlink()
    assert_one_line_error(script(name, *options, check=3), "bad.nii.gz", "none of 1")


def test_cases_from_files_folders_and_stores(volumes: Path) -> None:
    assert [case.name for case in find_cases(volumes)] == ["case_1", "case_2"]
    (only,) = find_cases(volumes / "case_2.nii.gz")
    assert isinstance(only, NiftiSource)
    assert only.load().hu.shape == (26, 40, 36)


def test_stores_beside_nifti_are_told(volumes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One store somewhere below must not make 2 volumes vanish without a word."""
    shutil.copytree(volumes, tmp_path / "data")
    (tmp_path / "data/cache").mkdir()
    write_store(tmp_path / "data/cache/old.b2nd", read_nifti(volumes / "case_1.nii.gz"), {})
    assert [case.name for case in find_cases(tmp_path / "data")] == ["old"]
    (message,) = [text for text in caplog.messages if "left out" in text]
    assert "1 stores (.b2nd) and 2 NIfTI files" in message
    caplog.clear()
    assert len(find_cases(volumes)) == 2
    assert [case.name for case in find_cases(tmp_path / "data/cache")] == ["old"]
    assert "left out" not in caplog.text


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.slow
def test_scripts_run_from_the_package_folder_and_explain_themselves(name: str, tmp_path: Path) -> None:
    command = [sys.executable, f"train/{name}.py"]
    options = {"cwd": ROOT / "patchwise_512x512x604", "env": environment(), "capture_output": True, "text": True}
    told = subprocess.run([*command, "--help"], check=True, timeout=60, **options)
    assert "--checkpoint" in told.stdout
    refused = subprocess.run([*command, "--checkpoint", "a"], timeout=60, **options)
    assert refused.returncode == (2 if name == "validate_patches" else 3)  # the others know their cases by the run
    assert data_option(name) in refused.stderr


@pytest.mark.slow
def test_held_out_cases_of_a_run_are_reconstructed(tmp_path: Path) -> None:
    """The whole way by the real commands: train, then samples of what was held out, without naming data."""
    options = ["dataset.size=null", "dataset.phantom_size=[20,36,36]", "dataset.patch_size=[16,16,16]"]
    run(PATCHWISE, *options, "training.max_steps=2", cwd=tmp_path)
    command = [sys.executable, str(ROOT / "patchwise_512x512x604/train/generate_samples.py"), "--video_frames", "2"]
    subprocess.run(
        [*command, "--checkpoint", "outputs/checkpoints/final.ckpt"], check=True, cwd=tmp_path, env=environment(),
        timeout=300,
    )  # fmt: skip
    made = {path.name for path in (tmp_path / "outputs/sample_reconstructions").iterdir()}
    assert made == {"phantom_00000.nii.gz", "phantom_00000.png", "phantom_00000.webp"}
    metrics = [sys.executable, str(ROOT / "patchwise_512x512x604/train/compute_metrics.py"), "--output", "report.json"]
    subprocess.run(
        [*metrics, "--checkpoint", "outputs/checkpoints/final.ckpt"], check=True, cwd=tmp_path, env=environment(),
        timeout=300,
    )  # fmt: skip
    report = json.loads((tmp_path / "report.json").read_text())
    assert [case["name"] for case in report["cases"]] == ["phantom_00000"]


@pytest.mark.slow
@pytest.mark.skipif(not (REAL_DATA / "ct_native").is_dir(), reason="no real CT volumes beside the repository")
def test_real_ct_at_full_resolution_in_plane(script: Script, checkpoint: Path, tmp_path: Path) -> None:
    """Twenty slices of 512×512 of a real patient: back on their own grid, and the figures are those of the file."""
    volume = read_nifti(REAL_DATA / "ct_native/lidc_0001.nii.gz")
    part = Volume(volume.hu[60:80], volume.affine, orientation=volume.orientation)
    write_nifti(tmp_path / "part.nii.gz", part)
    options = ("--checkpoint", checkpoint, "--output")
    script("generate_samples", *options, "out", "--data_dir", tmp_path / "part.nii.gz", "--video_frames", 2)
    script("compute_metrics", *options, "report.json", "--test_data", tmp_path / "part.nii.gz")
    (row,) = json.loads(Path("report.json").read_text())["cases"]
    restored = read_nifti(tmp_path / "out/part.nii.gz")
    assert np.array_equal(restored.affine, read_nifti(tmp_path / "part.nii.gz").affine)
    clipped = part.hu.clip(-1000, 1000).astype(float)
    assert row["mae_hu"] == pytest.approx(np.abs(restored.hu - clipped).mean(), rel=1e-3)
