"""The seam ratio that `compute_metrics` reports, by its definition: volumes of many tiles, in both modes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dataset.phantom import make_phantom
from dataset.tiling import HaloTiling, Tiling, Triple
from dataset.volume_io import Volume, write_nifti
from evaluation.metrics.seams import seam_ratio
from evaluation.reconstruct import reconstruct
from patchwise_512x512x604.evaluation_set import as_shown
from patchwise_512x512x604.utils.reconstruction import Mode, reconstruct_volume
from tests.patchwise.conftest import Script
from vq_gan_3d.pretrained import load_codec

SHAPES = {"case_1": (48, 64, 56), "case_2": (44, 60, 64)}


@pytest.fixture(scope="module")
def thoraces() -> dict[str, Volume]:
    """By name."""
    phantoms = {name: make_phantom(seed, shape) for seed, (name, shape) in enumerate(SHAPES.items(), 1)}
    return {name: Volume(phantom.hu, phantom.affine) for name, phantom in phantoms.items()}


@pytest.mark.parametrize(
    ("mode", "tile", "overlap"),
    [("blend", (16, 16, 16), None), ("blend", (16, 16, 16), 0.0), ("halo", (32, 32, 32), None)],
    ids=["blend", "side by side", "halo"],
)
def test_the_report_has_the_seams_of_the_volumes(
    script: Script,
    checkpoint: Path,
    thoraces: dict[str, Volume],
    tmp_path: Path,
    mode: Mode,
    tile: Triple,
    overlap: float | None,
) -> None:
    (tmp_path / "data").mkdir()
    for name, volume in thoraces.items():
        write_nifti(tmp_path / f"data/{name}.nii.gz", volume)
    options = ("--mode", mode, "--tile_size", *tile, *(() if overlap is None else ("--overlap", overlap)))
    script("compute_metrics", "--checkpoint", checkpoint, "--test_data", "data", *options)
    report = json.loads(Path("metrics_report.json").read_text())
    interval = report["aggregate"]["psnr_db"]
    assert interval["low"] < interval["mean"] < interval["high"]
    assert report["aggregate"]["seam_ratio"]["mean"] == np.mean([row["seam_ratio"] for row in report["cases"]])

    codec, window = load_codec(checkpoint)
    worst = []
    for row in report["cases"]:
        hu = thoraces[row["name"]].hu
        shown, stride, share = as_shown(hu, window), codec.config.total_stride, 0.25 if overlap is None else overlap
        tiling: Tiling | HaloTiling = Tiling(hu.shape, tile, share, stride)
        if mode == "halo":
            tiling = HaloTiling(hu.shape, tile, codec.config.receptive_halo_vox()[1], stride)
        assert all(len(borders) >= 2 for borders in tiling.borders)
        restored = reconstruct_volume(codec, hu, window, mode=mode, tile_dhw=tile, overlap=share).hu
        assert restored is not None
        assert row["seam_ratio"] == pytest.approx(seam_ratio(restored, shown, tiling), rel=1e-6)
        # what the anatomy alone makes at these places, without a tile
        worst.append(row["seam_ratio"] / seam_ratio(reconstruct(codec, window, hu)[0], shown, tiling))
    if mode == "halo":
        assert max(worst) <= 1.05
    elif overlap == 0:
        assert min(worst) > 1.05  # tiles without context show: the figure can tell
