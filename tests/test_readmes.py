"""Every command of the READMEs runs, in order, at tiny settings; the patch-wise guides have a test of their own."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset.volume_io import read_nifti
from tests.dataset.xray_factory import save_picture
from tests.ddpm.tiny import TINY_DDPM, saved_codec
from tests.helpers import ROOT, TINY, environment
from tests.inference_model import small_bundle

READMES = ["README.md", "ddpm/README.md", "baseline_256x256x64/README.md", "preprocess/README.md"]
TRAINING = ["training.max_steps=2", "training.num_epochs=9", "training.batch_size=1"]
CODEC = [*(option for option in TINY if not option.startswith("dataset.")), *TRAINING]
# What makes a command small, by its script; it comes last, so that it wins. Of the classifier's phantoms 1000 and 1001
# have no embolism, the next ten have one.
SMALL = {
    "train_vqgan.py": [*CODEC, "dataset.size=[16,16,16]"],
    "train_vqgan_distributed.py": [*CODEC, "dataset.patch_size=[16,16,16]", "dataset.validation_tiles=1"],
    "train_ddpm.py": [*(option for option in TINY_DDPM if "n_patients" not in option), *TRAINING],
    "train_classifier.py": [
        "model.widths=[4,8]",
        "model.strides=[[2,2,2],[1,2,2]]",
        "model.blocks=[1,1]",
        "dataset.size=[16,16,16]",
        "dataset.n_patients=12",
        "dataset.validation=[phantom_01000,phantom_01002]",
        "training.warmup_steps=2",
        "training.num_workers=0",
        "hardware.device=cpu",
        "hardware.mixed_precision=off",
        "callbacks.progress_bar=false",
        *TRAINING,
    ],
    "clinical.py": ["--steps", "2"],
    "lesion_survival.py": ["--cases", "2", "--size", "64", "128", "128"],
    "xray_to_ct.py": ["--steps", "2", "--samples", "1", "--cases", "2"],
    "sampler_table.py": ["--cases", "2", "--steps", "2"],
    "report.py": ["--cases", "1"],
    "vqgan_inference.py": ["--steps", "2"],
    "encode_latents.py": ["--devices", "1"],
    "compute_metrics.py": ["--tile_size", "32", "32", "32"],
}
# Of those held out 2 and 8 have an embolism, 0 and 1 have none.
PHANTOMS = ("dataset.n_patients=12", "dataset.validation=[phantom_00000,phantom_00001,phantom_00002,phantom_00008]")


def commands(readme: Path) -> list[str]:
    """Lines of the bash blocks of a README, without comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```", readme.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.strip() and not line.startswith("#")]


def run(words: list[str], cwd: Path, cache: Path) -> None:
    result = subprocess.run(
        words, cwd=cwd, env=environment(XDG_CACHE_HOME=str(cache)), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, f"{shlex.join(words)}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand-ins of what the READMEs presuppose: a hospital's files, a folder of NIfTI, a codec, a radiograph."""
    folder = tmp_path_factory.mktemp("readme")
    python, cache = sys.executable, folder / "cache"
    cohort = shlex.split("--output hospital --patients 6 --held-out 2 --size 32x32x64 --spacing 13x13x5")
    run([python, str(ROOT / "preprocess/make_phantom_cohort.py"), *cohort], folder, cache)
    convert = ["--input", "hospital", "--output", "nii"]
    run([python, str(ROOT / "preprocess/dicom_to_nifti.py"), *convert], folder, cache)
    (folder / "baseline_256x256x64/outputs/checkpoints").mkdir(parents=True)
    saved_codec(folder).rename(folder / "final.ckpt")
    shutil.copy(folder / "final.ckpt", folder / "baseline_256x256x64/outputs/checkpoints/final.ckpt")
    shutil.copy(next((folder / "hospital/xray").glob("*.png")), folder / "patient_xray.png")
    (folder / "ddpm").mkdir()
    return folder


def attempt(line: str, readme: Path, place: Path) -> None:
    """Run one line as its reader would, in a folder of ours."""
    for ours, theirs in (("/folder/of/nii.gz", "nii"), ("/folder", "nii"), ("/latents", "latents")):
        line = re.sub(rf"(?<=[ =]){ours}(?= |$)", str(place / theirs), line)
    line = re.sub(r"(?<=[ =])final\.ckpt", str(place / "final.ckpt"), line)
    words = shlex.split(re.sub(r"(?<=--grid |--size )256x256x64", "16x16x16", line), comments=True)
    if words[0] == "make":
        run(["make", "-n", *words[1:]], ROOT, place / "cache")
        return
    if words[:2] == ["pip", "install"]:
        assert all((readme.parent / word).exists() for word in words if word.endswith(".txt")), line
        return
    assert words[0] == "python", line
    beside = (readme.parent / words[1]).resolve()
    cwd = place / readme.parent.relative_to(ROOT) if beside.is_file() else place
    script = beside if beside.is_file() else ROOT / words[1]
    assert script.is_file(), line
    small = list(SMALL.get(script.name, ()))
    if "experiment=ddpm_phantom_codec" in words or "experiment=ddpm_phantom_cpu" in words:
        small += PHANTOMS
    run([sys.executable, str(script), *words[2:], *small], cwd, place / "cache")


@pytest.mark.slow
@pytest.mark.parametrize("name", READMES)
def test_the_commands_of_a_readme_run_one_after_the_other(name: str, place: Path, tmp_path: Path) -> None:
    copy = tmp_path / "place"
    shutil.copytree(place, copy)
    if name.startswith("baseline"):
        shutil.rmtree(copy / "baseline_256x256x64/outputs")  # it makes its own
    for line in commands(ROOT / name):
        attempt(line, ROOT / name, copy)
    if name == "README.md":
        picture = next((copy / "outputs/generated").rglob("*.png"))
        assert np.asarray(Image.open(picture)).std() > 10


def test_the_three_lines_of_the_readme_run(tmp_path: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    small_bundle(tmp_path / "final_model.ckpt")
    save_picture(tmp_path / "patient_xray.png", "L")
    run([sys.executable, "-c", code], tmp_path, tmp_path / "cache")
    assert read_nifti(tmp_path / "patient.nii.gz").hu.shape == (16, 16, 16)


@pytest.mark.parametrize("name", READMES)
def test_a_readme_names_only_what_exists(name: str) -> None:
    text = (ROOT / name).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or ((ROOT / name).parent / target).exists(), target
    for script in re.findall(r"^python (\S+\.py)", "\n".join(commands(ROOT / name)), re.MULTILINE):
        assert ((ROOT / name).parent / script).exists() or (ROOT / script).exists(), script


def test_the_tree_of_the_readme_is_the_tree() -> None:
    tree = (ROOT / "README.md").read_text().split("## Tree")[1].split("```")[1]
    folder, found = ROOT, 0
    for line in tree.splitlines():
        for name in re.findall(r"\b[\w*/]+\.py\b", line):
            where = [folder, ROOT, *(path for path in folder.iterdir() if path.is_dir())]
            if match := re.match(r"^(\w+)/", line):
                folder = ROOT / match[1]
                where = [folder, ROOT]
            assert any(list(base.glob(name)) for base in where), f"{line}: {name}"
            found += 1
        if match := re.match(r"^(\w+)/", line):
            folder = ROOT / match[1]
            assert folder.is_dir(), line
    assert found > 40
