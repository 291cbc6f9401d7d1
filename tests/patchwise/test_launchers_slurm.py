"""The launcher's jobs of SLURM, run by stand-ins of its commands, and folders of any name on all roads."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from torch.distributed.launcher.api import LaunchConfig

from dataset.sources import find_nifti
from tests.helpers import assert_one_line_error, environment, wait_for
from tests.patchwise.test_launchers import SMALL, dataset_folder, free_port, launch, started
from vq_gan_3d.checkpointing import load_checkpoint, newest_first

ODD_NAMES = (
    "CT (2020)", "a=b", "it's", "x&y", "[a]", "a#b", "josé", "a,b", "{a: b}", "a\\b", "a\\'b", "a\\", "$HOME", "${foo}",
    'say "a"', "null", "~x", "*",
)  # fmt: skip


def stand_ins(folder: Path, **scripts: str) -> dict[str, str]:
    """Put commands of SLURM into a folder; returns the variables of a job that finds them."""
    for name, text in scripts.items():
        path = folder / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    search = f"{folder}:{os.environ['PATH']}"
    return {"PATH": search, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "first,second"}


def test_slurm_job_starts_one_torchrun_on_each_machine(tmp_path: Path, fake_python: Path) -> None:
    """The submitted job is run by stand-ins of srun and scontrol: its quoting must survive two shells."""
    folder = dataset_folder(tmp_path)
    options = ("--python", fake_python, "--slurm", "--nodes", 2, "--gpus", 2, "--partition", "gpu", "--time", "1:00:00")
    command = started(launch(*options, "--data_dir", folder, "--dry-run", cwd=tmp_path))
    assert command[0] == "sbatch"
    assert {"--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2", "--partition=gpu", "--time=1:00:00"} <= set(
        command
    )
    job = command[-1].removeprefix("--wrap=")
    extra = stand_ins(fake_python.parent, srun='printf "%s\\n" "$@"', scontrol='printf "first\\nsecond\\n"')
    result = subprocess.run(["sh", "-c", job], env=environment(**extra), capture_output=True, text=True, check=True)
    arguments = result.stdout.splitlines()
    assert arguments[:4] == [
        "--kill-on-bad-exit=1", "--cpus-per-task=8", "env", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100"
    ]  # fmt: skip
    assert arguments[4:7] == [str(fake_python), "-m", "torch.distributed.run"]
    expected = {"--rdzv_endpoint=first:29500", "--rdzv_id=7", f"dataset.root_dir='{folder}'", "hardware.device=[0,1]"}
    assert expected <= set(arguments)
    refused = launch(*options, "--data_dir", folder, cwd=tmp_path, check=2)
    assert_one_line_error(refused, "sbatch")


def test_a_slurm_job_asks_for_cpus_and_what_else_is_named(tmp_path: Path, fake_python: Path) -> None:
    options = ("--python", fake_python, "--dry-run", "--slurm")
    further = ("--sbatch", "--account=lab --qos=long --mem=64G")
    for arguments, cpus in (
        (("--gpus", 2), 8),  # two workers and two more for each of two
        (("--gpus", 2, "training.num_workers=8"), 20),
        (("--gpus", 2, "--cpus_per_gpu", 5, "training.num_workers=8"), 10),
        (("--gpus", 0, "--processes", 3), 12),
    ):
        command = started(launch(*options, *arguments, *further, cwd=tmp_path))
        assert {f"--cpus-per-task={cpus}", "--account=lab", "--qos=long", "--mem=64G"} <= set(command[:-1])
        assert f" --cpus-per-task={cpus} " in command[-1]  # srun takes it from sbatch no more
    refused = launch(*options, "--gpus", 1, "--cpus_per_gpu", 0, cwd=tmp_path, check=2)
    assert_one_line_error(refused, "--cpus_per_gpu")


def test_torchrun_is_granted_less_time_than_slurm_grants_it(
    tmp_path: Path, fake_python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = started(launch("--python", fake_python, "--dry-run", "--slurm", "--gpus", 1, cwd=tmp_path))
    (granted,) = (int(word.partition("@")[2]) for word in command if word.startswith("--signal=TERM@"))
    (setting,) = (word for word in shlex.split(command[-1]) if word.startswith("TORCH_ELASTIC_SHUTDOWN_TIMEOUT="))
    name, _, seconds = setting.partition("=")
    assert 30 < int(seconds) < granted
    monkeypatch.setenv(name, seconds)
    assert LaunchConfig(1, 1, 1).shutdown_timeout == int(seconds)  # torch reads it


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_any_name_of_a_folder_arrives(tmp_path: Path, fake_python: Path, locale: str) -> None:
    """Through the launcher's shell, for SLURM through two more, and through Hydra's grammar."""
    parser = OverridesParser.create()
    extra = stand_ins(fake_python.parent, srun='printf "%s\\n" "$@"', scontrol="echo first")
    for name in ODD_NAMES:
        folder = tmp_path / name
        folder.mkdir()
        for volume in ("a.nii.gz", "b.nii.gz"):
            (folder / volume).touch()
        options = ("--python", fake_python, "--dry-run", "--data_dir", folder, "--output_dir", folder / "out")
        command = started(launch(*options, cwd=tmp_path, LC_ALL=locale))
        job = started(launch(*options, "--slurm", "--gpus", 1, cwd=tmp_path, LC_ALL=locale))[-1]
        shell = ["sh", "-c", job.removeprefix("--wrap=")]
        told = subprocess.run(shell, env=environment(**extra), capture_output=True, text=True, check=True)
        for words in (command, told.stdout.splitlines()):
            overrides = parser.parse_overrides([word for word in words if word.startswith(("output_dir", "dataset."))])
            assert not any(override.is_sweep_override() for override in overrides)
            values = OmegaConf.create({override.key_or_group: str(override.value()) for override in overrides})
            assert values["output_dir"] == str(folder / "out"), name
            assert values["dataset.root_dir"] == str(folder), name


@pytest.mark.slow
def test_training_starts_from_a_folder_of_any_name(tmp_path: Path, volumes: Path) -> None:
    folder = tmp_path / "it's CT (2020), a=b [x] #1 josé"
    shutil.copytree(volumes, folder / "data")
    options = ("--python", sys.executable, "--gpus", 0, "--min_free_gb", 0, "--data_dir", folder / "data")
    small = [option for option in SMALL if not option.startswith(("dataset.validation=", "dataset.phantom_size"))]
    small += ["dataset.size=null", "dataset.validation_fraction=0.2", "dataset.validation_tiles=2"]
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    launch(*options, "--output_dir", folder / "out", *small, "training.max_steps=1", cwd=tmp_path, **cache)
    assert (folder / "out/checkpoints/final.ckpt").is_file()
    record = OmegaConf.load(folder / "out/config.yaml")
    assert [source.path.parent for source in find_nifti(record.dataset.root_dir)] == [folder / "data"] * 2


@pytest.mark.slow
def test_t13_sigterm_to_a_slurm_job_saves_in_both_processes(tmp_path: Path) -> None:
    """The job of a dry run by stand-ins of srun and scontrol: torchrun gets the signal and hands it on."""
    options = ("--python", sys.executable, "--slurm", "--gpus", 0, "--processes", 2, "--min_free_gb", 0, "--dry-run")
    endless = ["training.max_steps=100000", "training.num_epochs=100000", "training.validate_every_n_epochs=100000"]
    options += ("--master_port", free_port())
    job = started(launch(*options, *SMALL, *endless, "logger.every_n_steps=1", cwd=tmp_path))[-1]
    skip_options = 'while [ "${1#--}" != "$1" ]; do shift; done'
    (tmp_path / "bin").mkdir()
    extra = stand_ins(
        tmp_path / "bin", srun=f'{skip_options}\necho $$ >"{tmp_path}/pid"\nexec "$@"', scontrol="echo 127.0.0.1"
    )
    process = subprocess.Popen(
        ["sh", "-c", job.removeprefix("--wrap=")], cwd=tmp_path, env=environment(**extra), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    wait_for(tmp_path / "outputs/logs/train.csv", process, timeout_s=400)
    assert not newest_first(tmp_path / "outputs/checkpoints")
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    out, err = process.communicate(timeout=200)
    assert process.returncode != 0
    told = out + err
    assert "SIGTERM" in told
    saved = newest_first(tmp_path / "outputs/checkpoints")
    assert saved, told[-3000:]
    assert int(load_checkpoint(saved[0])["current_model_state"]["steps"]) >= 1
