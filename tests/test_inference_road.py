"""The whole road by the real scripts: VQ-GAN, diffusion, export, and X-ray to volume in another folder."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dataset.volume_io import read_nifti
from tests.dataset.xray_factory import save_picture
from tests.ddpm.tiny import ddpm_command
from tests.helpers import BASELINE, REAL_DATA, ROOT, environment, run

RADIOGRAPHS = REAL_DATA / "xray"


def call(*command: str, cwd: Path, check: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=800)
    assert result.returncode == check, result.stdout[-2000:] + result.stderr[-4000:]
    return result


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained for a few steps, by the commands of the README."""
    folder = tmp_path_factory.mktemp("road")
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    try:
        size = ["dataset.size=[16,16,16]", "model.discriminator_iter_start=999", "training.max_steps=6"]
        run(BASELINE, *size, "training.learning_rate=0.003", cwd=folder)
        codec = folder / "outputs/checkpoints/final.ckpt"
        steps = ["training.max_steps=12", "training.num_epochs=99", "training.learning_rate=0.01"]
        steps.append("dataset.validation_fraction=0.34")  # two of six patients, whose radiographs can be exchanged
        call(*ddpm_command(codec, *steps, "output_dir=ddpm"), cwd=folder)
    finally:
        del os.environ["XDG_CACHE_HOME"]
    script = str(ROOT / "ddpm/export_bundle.py")
    call(sys.executable, script, "--checkpoint", "ddpm/checkpoints/final.ckpt", cwd=folder)
    assert "not for diagnosis" in (folder / "outputs/final_model.md").read_text()
    return folder / "outputs/final_model.ckpt"


@pytest.mark.slow
def test_from_training_to_a_volume(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "elsewhere").mkdir()
    save_picture(tmp_path / "x/a.png", "I;16")
    save_picture(tmp_path / "x/b.png", "L", optimize=True)
    picture = save_picture(tmp_path / "turned.png", "L")
    from PIL import Image

    Image.open(picture).rotate(180).save(tmp_path / "x/c.png")
    (tmp_path / "x/bad.png").write_bytes(b"no picture")
    command = [sys.executable, str(ROOT / "vqgan_inference.py"), "--checkpoint", str(bundle), "--steps", "4"]
    for output, folder in (("one", tmp_path), ("two", tmp_path / "elsewhere")):
        result = call(*command, "--xray", str(tmp_path / "x"), "--output", str(tmp_path / output), cwd=folder, check=4)
        assert result.stderr.strip().splitlines()[-1].startswith("left out: ")
        assert "bad.png" in result.stderr
    names = ("a.nii.gz", "b.nii.gz", "c.nii.gz")
    first, second = ({name: (tmp_path / out / name).read_bytes() for name in names} for out in ("one", "two"))
    assert first == second  # the same seed, a fresh process, another folder
    a, c = (read_nifti(tmp_path / "one" / name).hu for name in ("a.nii.gz", "c.nii.gz"))
    assert a.shape == (16, 16, 16)
    assert not np.array_equal(a, c)  # another X-ray under the same noise: the trained head has moved
    again = call(*command, "--xray", str(tmp_path / "x"), "--output", str(tmp_path / "one"), cwd=tmp_path, check=4)
    assert again.stdout.count("there already") == 3


@pytest.mark.slow
def test_the_card_takes_the_report_of_the_evaluation(bundle: Path, tmp_path: Path) -> None:
    run_folder = bundle.parents[1] / "ddpm"
    evaluation = [sys.executable, str(ROOT / "evaluation/xray_to_ct.py"), "--run", str(run_folder), "--cases", "2"]
    call(*evaluation, "--steps", "2", "--pictures", "0", "--output", "evaluation", cwd=tmp_path)
    export = [sys.executable, str(ROOT / "ddpm/export_bundle.py"), "--output", "with_report.ckpt"]
    export += ["--checkpoint", str(run_folder / "checkpoints/final.ckpt"), "--report", "evaluation/report.json"]
    call(*export, cwd=tmp_path)
    card = (tmp_path / "with_report.md").read_text()
    assert "| the patient's own X-ray |" in card
    assert "| patients of the training | 4 |" in card
    assert "| patients held out from it | 2 |" in card
    assert "phantom_0" not in card  # no case is named


@pytest.mark.slow
def test_the_first_line_does_not_wait_for_torch(bundle: Path, tmp_path: Path) -> None:
    """Which takes seconds to import; both are timed in turn, since the machine may be busy."""
    picture = save_picture(tmp_path / "a.png", "L")

    def seconds(*arguments: str) -> float:
        start = time.perf_counter()
        with subprocess.Popen(arguments, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline()
            took = time.perf_counter() - start
            process.communicate(timeout=300)
        return took

    torch_alone = [sys.executable, "-c", "import torch; print(torch.__version__, flush=True)"]
    ours = [sys.executable, str(ROOT / "vqgan_inference.py"), "--checkpoint", str(bundle), "--xray", str(picture)]
    seconds(*torch_alone)  # files into the cache of the system
    pairs = [(seconds(*ours, "--steps", "1", "--output", f"out{turn}"), seconds(*torch_alone)) for turn in range(3)]
    assert min(first for first, _ in pairs) < min(torch for _, torch in pairs)


@pytest.mark.slow
@pytest.mark.skipif(not RADIOGRAPHS.is_dir(), reason="no real radiographs beside the repository (shared/data)")
def test_t35_real_radiographs_of_hospitals_go_all_the_way(bundle: Path, tmp_path: Path) -> None:
    """JPEG 2000 and JPEG-LS of one MONOCHROME1 radiograph agree; 33 frontal ones all give a volume."""
    script = [sys.executable, str(ROOT / "vqgan_inference.py"), "--checkpoint", str(bundle), "--steps", "2"]
    call(*script, "--xray", str(RADIOGRAPHS / "dicom"), "--output", "dicom", cwd=tmp_path)
    pair = [read_nifti(path).hu for path in (tmp_path / "dicom").glob("*.nii.gz")]
    assert len(pair) == 2
    call(*script, "--xray", str(RADIOGRAPHS / "frontal"), "--output", "frontal", "--batch", "8", cwd=tmp_path)
    volumes = [read_nifti(path).hu for path in (tmp_path / "frontal").glob("*.nii.gz")]
    assert len(volumes) == 33
    assert len({volume.tobytes() for volume in volumes}) > 2  # after twelve steps it looks at little
    assert all(-1000 <= volume.min() < volume.max() <= 1000 for volume in volumes)
