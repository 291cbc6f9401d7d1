"""From a hospital's folder to a trained step, through every command in turn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dataset.phantom_dicom import phantom_volume, write_dicom_series
from dataset.sources import find_stores
from dataset.store import open_store
from dataset.volume_io import read_nifti
from tests.helpers import PATCHWISE, run

SIZE = (48, 40, 44)


@pytest.mark.slow
def test_dicom_becomes_a_trained_step(tmp_path: Path) -> None:
    volumes = {}
    for seed in range(3):
        volume, tags = phantom_volume(seed, SIZE)
        volumes[seed] = volume.hu
        write_dicom_series(volume, tmp_path / "hospital" / f"ward {seed}" / "ct", tags)
        if seed == 0:  # a second examination of the first patient
            write_dicom_series(volume, tmp_path / "hospital" / "later", replace(tags, study=2))

    def command(name: str, source: str, output: str, *flags: str) -> None:
        run(f"preprocess/{name}.py", "--input", source, "--output", output, *flags, cwd=tmp_path, tiny=False)

    command("dicom_to_nifti", "hospital", "nifti", "--max-thickness", "10")
    command("build_store", "nifti", "stores", "--workers", "2")
    command("verify", "stores", "checked")
    command("analyze_dataset", "nifti", "analysis")
    command("render_drr", "stores", "drr", "--size", "64", "--views", "frontal")

    converted = [read_nifti(path).hu for path in sorted((tmp_path / "nifti").glob("*.nii.gz"))]
    assert len(converted) == 4
    for hu in volumes.values():
        assert any(np.array_equal(hu, other) for other in converted)
    stores = find_stores(str(tmp_path / "stores"))
    assert len(stores) == 4
    assert len({source.patient for source in stores}) == 3  # both examinations of one patient on one side
    assert all(open_store(source.path).metadata["sidecar"]["kvp"] > 0 for source in stores)
    assert len(list((tmp_path / "drr").rglob("*_frontal.png"))) == 4
    assert (tmp_path / "analysis" / "dataset_analysis.json").stat().st_size > 1000

    options = ("dataset=store", "dataset.root_dir=stores", "dataset.size=null", "dataset.patch_size=[16,32,32]")
    # by name: names hash with a key of chance, and a fraction of three patients may be all of them
    held_out = f"dataset.validation=[{stores[0].patient}]"
    run(PATCHWISE, *options, held_out, "training.max_steps=2", cwd=tmp_path)
    assert (tmp_path / "outputs/checkpoints/final.ckpt").is_file()

    for path in tmp_path.rglob("*"):  # T45: PatientID, folder and description stay behind
        if "hospital" not in path.parts and path.is_file():
            for secret in (b"phantom_0000", b"ward 0", b"PE PROTOCOL"):
                assert secret not in path.read_bytes(), path
                assert secret.decode() not in path.name
