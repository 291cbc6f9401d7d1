"""Imports point one way, and the inference road loads no training framework."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers import ROOT, environment


def imported_by(module: str, tmp_path) -> set[str]:
    code = f"import sys, {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


@pytest.mark.parametrize(
    "module", ["vq_gan_3d.codec", "vq_gan_3d.checkpointing", "ddpm.generate", "ddpm.inference_run"]
)
def test_the_inference_road_is_light(module, tmp_path):
    loaded = imported_by(module, tmp_path)
    assert "torch" in loaded
    assert loaded.isdisjoint({
        "pytorch_lightning", "lightning_fabric", "torchmetrics", "torchvision", "hydra", "omegaconf", "tensorboard",
        "matplotlib", "monai",
    })  # fmt: skip


def test_the_runner_needs_no_torchvision(tmp_path):
    loaded = imported_by("vq_gan_3d.runner", tmp_path)
    assert "pytorch_lightning" in loaded
    assert loaded.isdisjoint({"torchvision", "monai"})


@pytest.mark.parametrize(
    ("lower", "upper"),
    [
        ("dataset", ("vq_gan_3d", "evaluation", "baseline_256x256x64", "patchwise_512x512x604", "preprocess", "ddpm")),
        ("vq_gan_3d", ("baseline_256x256x64", "patchwise_512x512x604", "preprocess", "ddpm", "benchmarks")),
        ("evaluation/metrics", ("vq_gan_3d", "baseline_256x256x64", "patchwise_512x512x604", "preprocess", "ddpm")),
        ("preprocess", ("baseline_256x256x64", "patchwise_512x512x604", "ddpm", "benchmarks")),
        ("baseline_256x256x64", ("patchwise_512x512x604", "ddpm", "preprocess")),
        ("patchwise_512x512x604", ("baseline_256x256x64", "ddpm", "preprocess")),
    ],
)
def test_imports_point_one_way(lower, upper):
    offenders = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sorted((ROOT / lower).rglob("*.py"))
        for line in path.read_text().splitlines()
        if line.split()[:1] in (["import"], ["from"]) and line.split()[1].split(".")[0] in upper
    ]
    assert offenders == []


def test_package_inits_import_nothing():
    packages = [
        p for p in ROOT.glob("*/**/__init__.py") if not any(s.startswith(".") for s in p.relative_to(ROOT).parts)
    ]
    assert packages
    assert [str(p) for p in packages if "import" in p.read_text()] == []
