"""Every command of the guides runs: as it stands, at tiny settings and paths; what needs GPUs or SLURM as a dry run.

Of a dry run the settings that its command ends in are composed by Hydra, which refuses keys that are none.
``python`` is what the guide made it: no environment is on the search path before the guide's own ``source``.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig

from tests.helpers import ROOT, environment
from tests.patchwise.conftest import fake_python_in
from tests.patchwise.test_launchers import SMALL, launch

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


def preamble(guide: str, line: str) -> list[str]:
    """What the guide did to the shell before a command: its folder and its search path."""
    (path,) = (path for path in GUIDES if path.name == guide)
    lines = [command for block in blocks(path) for command in block]
    return [command for command in lines[: lines.index(line)] if command.startswith(("cd ", "source "))]


def test_python_is_that_of_the_environment() -> None:
    """No command by a bare ``python`` or from the environment's bin before the guide has activated it."""
    for guide in GUIDES:
        folder = PACKAGE if guide.parent == PACKAGE else ROOT
        commands = [line for block in blocks(guide) for line in block]
        for line in commands:
            for activated in (before for before in preamble(guide.name, line) if before.startswith("source ")):
                script = folder / activated.removeprefix("source ")
                assert script.resolve() == (ROOT / ".venv").resolve() / "bin/activate", f"{guide.name}: {activated}"
            if line.split()[0] in ("python", "tensorboard", "pip"):
                assert any(before.startswith("source ") for before in preamble(guide.name, line)), (
                    f"{guide.name}: {line}"
                )


def test_no_run_of_a_guide_meets_the_checkpoints_of_another() -> None:
    """One that is no continuation has a folder of its own, or it would end with exit 2."""
    for guide in GUIDES:
        filled: list[str] = []
        for name, line in every_command():
            trains = "launch_distributed_training.sh" in line or "train_vqgan_distributed.py" in line
            if name == guide.name and trains and "--dry-run" not in line:
                given = re.search(r"output_dir[ =](\S+)", line)
                folder = given[1] if given else "outputs"
                assert (folder in filled) == ("ckpt_path=last" in line), f"{name}: {line}"
                filled.append(folder)
        assert filled or guide.name == "VALIDATION_GUIDE.md"


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


def make_checkout(folder: Path) -> Path:
    """The repository as a user has it, of links: with a ``.venv`` of its own, and room for outputs in the package."""
    package = folder / PACKAGE.name
    package.mkdir(parents=True)
    for source, target in ((ROOT, folder), (PACKAGE, package)):
        for entry in source.iterdir():
            if entry.name not in (".git", ".venv", "outputs", PACKAGE.name):
                (target / entry.name).symlink_to(entry)
    commands = folder / ".venv/bin"
    commands.mkdir(parents=True)
    real = Path(sys.executable).parent
    for name in ("python", "tensorboard"):
        (commands / name).write_text(f'#!/bin/sh\nexec "{real}/{name}" "$@"\n')
        (commands / name).chmod(0o755)
    (commands / "activate").write_text(f'export PATH="{commands}:$PATH"\n')
    (folder / ".venv/.installed").touch()  # newer than what `make venv` installs: it is done
    return folder


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, volumes: Path) -> Path:
    """Stand-ins of the folders that the guides name: data, a finished run, a volume that survives the container."""
    folder = tmp_path_factory.mktemp("guide")
    for name in ("nii", "test", "workspace/data", "workspace/test"):
        shutil.copytree(volumes, folder / name)
    package = make_checkout(folder / "workspace/X-ray2CTPA") / PACKAGE.name
    for run in (package / "outputs", folder / "workspace/outputs"):
        shutil.copytree(checkpoint.parent, run / "checkpoints")
        (run / "logs").mkdir()
        (run / "config.yaml").write_text((ROOT / "config/dataset/phantom.yaml").read_text())
    (folder / "workspace/outputs/metrics_report.json").write_text("{}")  # of the command before, which may run later
    fake_python_in(folder / "bin")
    return folder


def further(line: str, workplace: Path) -> list[str]:
    """What is added to a command of a guide: tiny settings, and no GPU."""
    words = shlex.split(line)
    name = Path(words[1] if words[0] == "python" else words[0]).name
    more: list[str] = []
    if name == "launch_distributed_training.sh":
        more += ["--min_free_gb", "0", *([] if "--gpus" in words else ["--gpus", "0"])]
        more += ["--python", str(workplace / "bin/python"), "--dry-run"] if needs_dry_run(line) else []
    if name in ("launch_distributed_training.sh", "train_vqgan_distributed.py") and not needs_dry_run(line):
        more += TINY_TRAINING
        more += ["dataset.phantom_size=[20,36,36]", "dataset.validation_fraction=0.2"]  # one of the two is held out
        more += ["hardware.device=cpu"] if name == "train_vqgan_distributed.py" else []
    if name == "generate_samples.py":
        more += ["--video_frames", "2"] + ([] if "--data_dir" in words else ["--data_dir", str(workplace / "test")])
    return more + (["--version"] if name == "tensorboard" else [])


def attempt(guide: str, line: str, workplace: Path, checkout: Path) -> str:
    """Run a command in a shell that has done nothing but what the guide did before it; returns its standard output."""

    def here(text: str) -> str:
        text = text.replace("/folder/of/nii.gz", str(workplace / "nii"))
        text = text.replace("/folder/of/test", str(workplace / "test"))
        return re.sub(r"(?<![\w.])/workspace", str(workplace / "workspace"), text)

    command = " ".join([here(line), *map(shlex.quote, further(line, workplace))])
    script = "\n".join(["set -e", *map(here, preamble(guide, line)), command])
    search = [part for part in os.environ["PATH"].split(":") if Path(part) != Path(sys.executable).parent]
    extra = {"XDG_CACHE_HOME": str(workplace / "cache"), "PATH": ":".join(search)}
    cwd = checkout if guide == GUIDES[-1].name else checkout / PACKAGE.name
    result = subprocess.run(
        ["bash", "-c", script], cwd=cwd, env=environment(**extra), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, f"{script}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result.stdout


def composed(told: str) -> DictConfig:
    """The configuration of the training that a dry run printed, also of one inside a job of SLURM.

    Raises:
        Exception: Hydra's, of a setting that is none.
    """
    (line,) = [line for line in told.splitlines() if line.startswith("command: ")]
    words = shlex.split(line)
    if "sbatch" in words:
        (job,) = [word.removeprefix("--wrap=") for word in words if word.startswith("--wrap=")]
        words = shlex.split(job)
    (script,) = [at for at, word in enumerate(words) if word.endswith("train_vqgan_distributed.py")]
    with initialize_config_dir(str(PACKAGE / "config"), version_base="1.3"):
        return compose("base_cfg", overrides=words[script + 1 :])


@pytest.mark.parametrize("slurm", [(), ("--slurm",)], ids=["here", "slurm"])
def test_settings_of_a_dry_run_are_seen_by_hydra(tmp_path: Path, fake_python: Path, slurm: tuple[str, ...]) -> None:
    """So a slip in a line with GPUs is found on a machine that has none."""
    options = ("--python", fake_python, "--dry-run", "--gpus", 2, *slurm, "--output_dir", tmp_path / "it's, mine")
    config = composed(launch(*options, "training.batch_size=4", "hardware.checkpointing=true", cwd=tmp_path).stdout)
    assert config.training.batch_size == 4
    assert config.hardware.device == [0, 1]
    assert config.output_dir == f"{tmp_path}/it's, mine"
    for slip, words in (("training.bacth_size=4", "bacth_size"), ("experiment=patchwise_gpu", "patchwise_gpu")):
        told = launch(*options, slip, cwd=tmp_path).stdout
        with pytest.raises(HydraException, match=words):
            composed(told)


@pytest.mark.slow
@pytest.mark.parametrize(("guide", "line"), [pair for pair in every_command() if not is_start(pair[1])])
def test_a_command_of_a_guide_runs(guide: str, line: str, workplace: Path) -> None:
    told = attempt(guide, line, workplace, workplace / "workspace/X-ray2CTPA")
    if needs_dry_run(line):
        composed(told)


@pytest.mark.slow
@pytest.mark.parametrize("guide", [guide.name for guide in GUIDES])
def test_the_training_commands_of_a_guide_run_one_after_the_other(guide: str, workplace: Path, tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path / "checkout")
    for name, line in every_command():
        if name == guide and is_start(line):
            attempt(guide, line, workplace, checkout)
