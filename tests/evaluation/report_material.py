"""A patient, and results as the scripts write them, for the tests of the report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from dataset.intensity import HUWindow
from evaluation.report_cases import GENERATED, RECONSTRUCTION, ReportCase

HOSTILE = "<img src=x onerror=alert(1)>\"'&</script>"  # a name that no page may take for markup
SPACING_MM = 5.0
# Where the bright block of `lopsided` lies: superior, anterior, on the patient's left.
BLOCK = (slice(18, 36), slice(4, 22), slice(18, 36))


def lopsided(name: str = "case_1") -> ReportCase:
    """A box of water in air, 40×40×40 voxels, with a bright block superior, anterior and left."""
    hu = np.full((40, 40, 40), -1000.0, dtype=np.float32)
    hu[2:38, 2:38, 2:38] = 0
    hu[BLOCK] = 350
    affine = np.array(  # index (d, h, w) -> RAS mm: superior, posterior and left with growing index
        [[0, 0, -SPACING_MM, 100], [0, -SPACING_MM, 0, 100], [SPACING_MM, 0, 0, -100], [0, 0, 0, 1]], dtype=np.float64
    )
    xray = np.zeros((32, 32), dtype=np.float32)
    xray[4:28, 4:28] = 0.5
    volumes = {RECONSTRUCTION: hu + 10, GENERATED: np.clip(hu * 0.8, -1000, 1000)}
    return ReportCase(name, hu, affine, HUWindow(), volumes, (("frontal", xray),))


def figure(middle: float) -> dict[str, float]:
    """An estimate with its interval."""
    return {"estimate": middle, "low": middle - 1, "high": middle + 1, "n": 4}


def write_generation(folder: Path, **settings: object) -> Path:
    """``report.json`` of ``evaluation/xray_to_ct.py``, with what a reader must not pass on."""
    scores = {key: figure(20.0) for key in ("psnr_body_db", "psnr_db", "mae_hu")} | {"ssim": None}
    summary = {
        "cases": 4,
        "scores": {"right": scores, "shuffled": scores},
        "gains": {"shuffled": {"psnr_body_db": figure(2.5)}},
        "correlations": {"right": {"lung_ml": figure(0.5)}},
        "chirality": figure(0.25) | {"share_right_way_round": 1.0},
        "bars": [{"bar": "a bar", "low": 1.0, "asked": 2.0, "passed": False}],
    }
    failed = {"case_9": f"{folder}/secret/case_9.nii.gz: truncated"}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.json"
    path.write_text(json.dumps({"settings": settings, "summary": summary, "patients": {}, "failed": failed}))
    return path


def write_codec_metrics(folder: Path, name: str = "case_1") -> Path:
    """``metrics.json`` of ``evaluation/reconstruct.py``."""
    row = {
        "psnr_db": 31.25,
        "psnr_slice_db": 32.0,
        "psnr_pe_window_db": 25.0,
        "ssim": 0.9,
        "mae_hu": 9.0,
        "bias_hu": -1,
    }
    content = {"volumes": {name: row}, "mean": row, "code_usage": 0.5, "code_perplexity": 99.5, "data_range_hu": 2000}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.json"
    path.write_text(json.dumps(content))
    return path


def write_run(folder: Path, kind: str = "codec") -> Path:
    """A training run with a configuration and logs, without checkpoints."""
    key = {"codec": "code_channels: 4", "diffusion": "conditioner: {views: [frontal]}", "classifier": "input: volume"}
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    root = folder.resolve() / "Canary^Patient"
    (folder / "config.yaml").write_text(f"model: {{{key[kind]}}}\ndataset: {{name: nifti, root_dir: '{root}'}}\n")
    train = {"codec": "l1", "diffusion": "loss", "classifier": "loss"}[kind]
    (folder / "logs" / "train.csv").write_text(f"step,epoch,{train}\n10,0,0.5\n20,0,nan\n30,1,0.125\n40,1")
    validation = {"codec": "psnr_db", "diffusion": "sample_psnr_db", "classifier": "auroc"}[kind]
    (folder / "logs" / "validation.csv").write_text(f"step,epoch,{validation}\n20,0,0.5\n30,1,0.75\n")
    return folder
