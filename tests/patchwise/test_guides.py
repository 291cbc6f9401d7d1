"""Every command of the guides runs: as it stands, at tiny settings and paths; what needs GPUs or SLURM as a dry run."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT, environment
from tests.patchwise.test_launchers import SMALL, fake_python_in

PACKAGE = ROOT / "patchwise_512x512x604"
GUIDES = [
    *(PACKAGE / name for name in ("README.md", "TRAINING_GUIDE.md", "VALIDATION_GUIDE.md", "RUNPOD_TRAINING_GUIDE.md")),
    ROOT / "SETUP_PATCHWISE_TRAINING.md",
]
# Small enough for seconds; after the command's own settings, so that these win.
TINY_TRAINING = [option for option in SMALL if not option.startswith(("dataset.validation=", "dataset.phantom_size"))]
TINY_TRAINING += ["training.max_steps=2", "training.num_epochs=9", "dataset.size=null", "training.batch_size=1"]
TINY_TRAINING += ["dataset.validation_tiles=2", "dataset.cache_dir=null"]


def blocks(guide: Path) -> list[list[str]]:
    """The commands of each bash block of a guide."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", guide.read_text(), re.MULTILINE | re.DOTALL)
    assert all(language == "bash" for language, _ in found), guide
    return [[line for line in block.splitlines() if line and line[0] != "#"] for _, block in found]


def every_command() -> list[tuple[str, str]]:
    return list(dict.fromkeys((guide.name, line) for guide in GUIDES for block in blocks(guide) for line in block))


def is_start(line: str) -> bool:
    """Whether a command trains here, which takes longer than a check."""
    trains = "launch_distributed_training.sh" in line or "train_vqgan_distributed.py" in line
    return trains and not needs_dry_run(line) and "--dry-run" not in line


def needs_dry_run(line: str) -> bool:
    return bool(re.search(r"--gpus [1-9]|--slurm|--node_rank", line))


def test_guides_name_only_what_exists() -> None:
    """Links lead somewhere, scripts are there, and keys of the tables are keys of the configuration."""
    for guide in GUIDES:
        text = guide.read_text()
        for target in re.findall(r"\]\(([^)]+)\)", text):
            assert (guide.parent / target).exists(), f"{guide.name}: {target}"
        for script in re.findall(r"`((?:train|utils)/\S*)`", text):
            assert (PACKAGE / script).exists(), f"{guide.name}: {script}"
    config = "\n".join(path.read_text() for path in (ROOT / "config").rglob("*.yaml"))
    for key in re.findall(r"^\| `(?:training|dataset|hardware|model)\.(\w+)`", "\n".join(
        guide.read_text() for guide in GUIDES), re.MULTILINE):  # fmt: skip
        assert re.search(rf"^\s*{key}:", config, re.MULTILINE), key


def test_report_keys_of_the_guide_are_those_of_the_script() -> None:
    source = (PACKAGE / "train/compute_metrics.py").read_text() + (ROOT / "evaluation/metrics/image.py").read_text()
    table = (PACKAGE / "VALIDATION_GUIDE.md").read_text().split("## Reading the report")[1]
    keys = [key for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for key in re.findall(r"`(\w+)`", row)]
    assert len(keys) >= 9
    assert all(f'"{key}"' in source for key in keys)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, volumes: Path) -> Path:
    """Stand-ins of the folders that the guides name: data, a finished run, a volume that survives the container."""
    folder = tmp_path_factory.mktemp("guide")
    for name in ("nii", "test", "workspace/data", "workspace/test"):
        shutil.copytree(volumes, folder / name)
    for run in ("run/outputs", "workspace/outputs"):
        shutil.copytree(checkpoint.parent, folder / run / "checkpoints")
        (folder / run / "logs").mkdir()
        (folder / run / "config.yaml").write_text((ROOT / "config/dataset/phantom.yaml").read_text())
    fake_python_in(folder / "bin")
    (folder / "workspace/X-ray2CTPA").symlink_to(ROOT)
    return folder


def substituted(line: str, workplace: Path, cwd: Path) -> list[str]:
    """A command of a guide with paths of this machine and tiny settings."""
    line = line.replace("/folder/of/nii.gz", str(workplace / "nii")).replace("/folder/of/test", str(workplace / "test"))
    line = re.sub(r"(?<![\w.])/workspace", str(workplace / "workspace"), line)
    words = shlex.split(line)
    if words[0] == "python":
        script = PACKAGE / words[1] if (PACKAGE / words[1]).exists() else ROOT / words[1]
        assert script.is_file(), line
        words[:2] = [sys.executable, str(script)]
    elif words[0].endswith(".sh"):
        words[0] = str(PACKAGE / Path(words[0]).name)
    name = Path(words[0] if words[0] != sys.executable else words[1]).name
    if name == "launch_distributed_training.sh":
        python = workplace / "bin/python" if needs_dry_run(line) else sys.executable
        words += ["--python", str(python), "--min_free_gb", "0", *(["--dry-run"] if needs_dry_run(line) else [])]
        words += [] if "--gpus" in words else ["--gpus", "0"]
    if name == "setup_training.sh" and "--check" not in words:
        words.append("--help")  # `make venv` is what made the environment of this test
    if name in ("launch_distributed_training.sh", "train_vqgan_distributed.py"):
        words += TINY_TRAINING + ([] if "ckpt_path=last" in words else ["overwrite=true"])
        words += ["dataset.phantom_size=[20,36,36]", "dataset.validation_fraction=0.2"]  # one of the two is held out
        words += ["hardware.device=cpu"] if name == "train_vqgan_distributed.py" else []
    if name == "generate_samples.py":
        words += ["--video_frames", "2"] + ([] if "--data_dir" in words else ["--data_dir", str(workplace / "test")])
    if name == "tensorboard":
        words.append("--version")
        words[0] = str(Path(sys.executable).parent / "tensorboard")
    return words


def attempt(line: str, workplace: Path, cwd: Path) -> None:
    if line.startswith("cd "):
        assert Path(line.removeprefix("cd ").replace("/workspace", str(workplace / "workspace"))).is_dir()
        return
    words = substituted(line, workplace, cwd)
    extra = {"XDG_CACHE_HOME": str(workplace / "cache")}
    result = subprocess.run(
        words, cwd=cwd, env=environment(**extra), capture_output=True, text=True, timeout=300
    )  # fmt: skip
    assert result.returncode == 0, f"{shlex.join(words)}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"


@pytest.mark.slow
@pytest.mark.parametrize(("guide", "line"), [pair for pair in every_command() if not is_start(pair[1])])
def test_a_command_of_a_guide_runs(guide: str, line: str, workplace: Path) -> None:
    attempt(line, workplace, workplace / "run")


@pytest.mark.slow
@pytest.mark.parametrize("guide", [guide.name for guide in GUIDES])
def test_the_training_commands_of_a_guide_run_one_after_the_other(guide: str, workplace: Path, tmp_path: Path) -> None:
    for name, line in every_command():
        if name == guide and is_start(line):
            attempt(line, workplace, tmp_path)
