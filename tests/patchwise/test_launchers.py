"""The launchers: what they start, what they refuse before they start it, and that it runs."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT, TINY, assert_one_line_error, environment, run
from vq_gan_3d.checkpointing import load_checkpoint

PACKAGE = ROOT / "patchwise_512x512x604"
LAUNCH = PACKAGE / "launch_distributed_training.sh"
SETUP = PACKAGE / "setup_training.sh"
SMALL = [
    *[option for option in TINY if not option.startswith(("dataset.size", "hardware."))],
    "dataset.phantom_size=[20,36,36]",
    "dataset.patch_size=[16,16,16]",
    "dataset.patches_per_volume=4",
    "dataset.validation=[phantom_00000,phantom_00001]",
]


def launch(*arguments: object, cwd: Path, check: int = 0, **extra: str) -> subprocess.CompletedProcess[str]:
    command = [str(LAUNCH), *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, env=environment(**extra), capture_output=True, text=True, timeout=300)
    assert result.returncode == check, f"exit {result.returncode}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result


def started(result: subprocess.CompletedProcess[str]) -> list[str]:
    """The command that a dry run printed, as a shell would split it."""
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("command: ")]
    return shlex.split(line.removeprefix("command: "))


def dataset_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "my data"
    folder.mkdir()
    for name in ("a.nii.gz", "b.nii.gz"):
        (folder / name).touch()
    return folder


def test_one_machine_uses_all_its_gpus(tmp_path: Path, fake_python: Path) -> None:
    folder = dataset_folder(tmp_path)
    options = ("--python", fake_python, "--dry-run", "--data_dir", folder, "training.batch_size=4", "ckpt_path=last")
    command = started(launch(*options, cwd=tmp_path))
    assert command[:2] == [str(fake_python), str(PACKAGE / "train/train_vqgan_distributed.py")]
    assert command[2:] == [
        f"output_dir='{tmp_path}/outputs'", f"dataset.root_dir='{folder}'", "hardware.device=[0,1]",
        "training.batch_size=4", "ckpt_path=last",
    ]  # fmt: skip
    assert "hardware.device=[0]" in started(launch(*options, "--gpus", 1, cwd=tmp_path))
    command = started(launch(*options, "--gpus", 0, "--processes", 3, cwd=tmp_path))
    assert {"hardware.device=cpu", "hardware.processes=3"} <= set(command)


def test_stores_are_counted_where_the_command_trains_on_stores(tmp_path: Path, fake_python: Path) -> None:
    folder = tmp_path / "stores"
    (folder / "site").mkdir(parents=True)
    for name in ("a.b2nd", "site/b.b2nd", ".hidden.b2nd"):
        (folder / name).touch()
    options = ("--python", fake_python, "--dry-run", "--data_dir", folder)
    result = launch(*options, "dataset=store", "training.batch_size=4", cwd=tmp_path)
    assert f"data: 2 volumes in {folder}" in result.stdout
    assert {f"dataset.root_dir='{folder}'", "dataset=store"} <= set(started(result))
    for overrides in ((), ("dataset=store", "dataset=nifti")):  # the last one counts
        refused = launch(*options, *overrides, cwd=tmp_path, check=3)
        assert_one_line_error(refused, "holds 0 .nii.gz files", "add dataset=store")
    (folder / "a.b2nd").unlink()
    assert_one_line_error(launch(*options, "dataset=store", cwd=tmp_path, check=3), "holds 1 .b2nd files")


def test_a_dry_run_makes_nothing(tmp_path: Path, fake_python: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    for given, meant in (("outputs/full", here / "outputs/full"), ("../beside", tmp_path / "beside")):
        for more in ((), ("--slurm", "--gpus", 1)):
            result = launch("--python", fake_python, "--dry-run", "--output_dir", given, *more, cwd=here)
            assert f"{meant}'" in " ".join(started(result))
            assert f"output: {meant} (" in result.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"bin", "here"}
    assert not list(here.iterdir())
    (here / "file").touch()
    options = ("--python", fake_python, "--dry-run", "--output_dir", "file/inside")
    assert_one_line_error(launch(*options, cwd=here, check=6), "inside")
    (here / "outputs").mkdir()
    assert f"output_dir='{here}/outputs'" in started(launch("--python", fake_python, "--dry-run", cwd=here))


def test_several_machines_by_torchrun(tmp_path: Path, fake_python: Path) -> None:
    options = ("--python", fake_python, "--dry-run", "--nodes", 2, "--master_addr", "node-a", "--node_rank", 1)
    command = started(launch(*options, cwd=tmp_path))
    assert command[:2] == ["env", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100"]
    assert command[3:6] == ["-m", "torch.distributed.run", "--nnodes=2"]
    assert {"--nproc_per_node=2", "--node_rank=1", "--master_addr=node-a", "--master_port=29500"} <= set(command)
    assert {"hardware.device=[0,1]", "hardware.num_nodes=2"} <= set(command)


def test_what_is_refused_before_anything_starts(tmp_path: Path, fake_python: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    (few / "a.nii.gz").touch()
    file = tmp_path / "file"
    file.touch()
    for arguments, code, words in (
        (("--gpu", 1), 2, "--gpu is unknown"),
        (("something",), 2, "something"),
        (("--gpus",), 2, "--gpus needs a value"),
        (("--gpus", "two"), 2, "--gpus two"),
        (("--gpus", 3), 2, "has 2"),
        (("--nodes", 2), 2, "--node_rank"),
        (("--slurm", "--dry-run"), 2, "--slurm needs --gpus"),
        (("--partition", "gpu"), 2, "--partition"),
        (("--sbatch", "--mem=64G"), 2, "--sbatch"),
        (("--nodes", 2, "--node_rank", 2, "--master_addr", "a"), 2, "--node_rank 2"),
        (("--data_dir", tmp_path / "none"), 3, "none"),
        (("--data_dir", few), 3, "holds 1"),
        (("--output_dir", file / "inside"), 6, "inside"),
        (("--min_free_gb", 999999), 6, "999999"),
    ):
        assert_one_line_error(launch("--python", fake_python, *arguments, cwd=tmp_path, check=code), words)
    assert_one_line_error(launch("--python", "/bin/false", cwd=tmp_path, check=2), "/bin/false")
    bare = tmp_path / "bare"
    bare.write_text("#!/bin/sh\nexit 4\n")
    bare.chmod(0o755)
    assert_one_line_error(launch("--python", bare, cwd=tmp_path, check=2), "packages are missing")
    assert "--dry-run" in launch("--help", cwd=tmp_path).stdout


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_t05_an_unwritable_folder_is_told_first(tmp_path: Path, fake_python: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert_one_line_error(launch("--python", fake_python, "--output_dir", locked, cwd=tmp_path, check=6), "locked")


@pytest.mark.slow
def test_setup_says_what_is_there_and_refuses_an_old_python(tmp_path: Path) -> None:
    if not (ROOT / ".venv/bin/python").exists() and sys.prefix == sys.base_prefix:
        pytest.skip("no virtual environment to look at")
    result = subprocess.run(
        [SETUP, "--check", "--python", sys.executable], cwd=tmp_path, capture_output=True, text=True,
        env=environment(), timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "torch" in result.stdout
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    refused = subprocess.run([SETUP, "--check", "--python", str(old)], capture_output=True, text=True)
    assert refused.returncode == 2
    assert_one_line_error(refused, "python3", "3.11")


@pytest.mark.slow
def test_setup_takes_a_python_beside_the_caller(tmp_path: Path) -> None:
    """A relative path is meant from where the command is given, not from the checkout."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(f'#!/bin/sh\necho asked >>"{tmp_path}/asked"\nexec "{sys.executable}" "$@"\n')
    (tmp_path / "bin/python").chmod(0o755)
    command = [SETUP, "--check", "--python", "./bin/python"]
    result = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "asked").is_file()


def test_shell_scripts_are_sound() -> None:
    for path in sorted(PACKAGE.glob("*.sh")):
        assert os.access(path, os.X_OK), path
        subprocess.run([shutil.which("bash") or "bash", "-n", str(path)], check=True)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.slow
def test_two_processes_on_the_cpu_and_exit_codes_pass(tmp_path: Path) -> None:
    options = ("--python", sys.executable, "--gpus", 0, "--min_free_gb", 0)
    launch(*options, "--processes", 2, *SMALL, "training.max_steps=2", cwd=tmp_path)
    assert (tmp_path / "outputs/checkpoints/final.ckpt").is_file()
    refused = launch(*options, *SMALL, cwd=tmp_path, check=2)  # the trainer's own refusal
    assert_one_line_error(refused, "ckpt_path=last")


@pytest.mark.slow
def test_two_machines_train_and_resume_as_one(tmp_path: Path) -> None:
    """Two torchruns of two processes each, on one address, with one output folder; then on from the checkpoint."""

    def both(*overrides: str) -> None:
        port = free_port()
        options = ["--python", sys.executable, "--gpus", "0", "--processes", "2", "--min_free_gb", "0"]
        options += ["--nodes", "2", "--master_addr", "127.0.0.1", "--master_port", str(port)]
        command = [str(LAUNCH), *options, "--node_rank"]
        machines = [
            subprocess.Popen(
                [*command, str(rank), *SMALL, *overrides], cwd=tmp_path, env=environment(), text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            )
            for rank in range(2)
        ]  # fmt: skip
        told = [machine.communicate(timeout=400)[0] for machine in machines]
        assert [machine.returncode for machine in machines] == [0, 0], told[0][-3000:] + told[1][-3000:]

    def state(name: str) -> dict:
        return load_checkpoint(tmp_path / name / "checkpoints/final.ckpt")["current_model_state"]

    both("training.max_steps=2", "output_dir=outputs")
    both("training.max_steps=4", "output_dir=outputs", "ckpt_path=last")
    script = "patchwise_512x512x604/train/train_vqgan_distributed.py"
    options = [*SMALL, "hardware.device=cpu", "hardware.processes=4", "output_dir=one", "training.max_steps=4"]
    run(script, *options, cwd=tmp_path, tiny=False)
    one, two = state("one"), state("outputs")
    assert int(one["steps"]) == int(two["steps"]) == 4
    for name, value in one.items():
        assert value.equal(two[name]), name
