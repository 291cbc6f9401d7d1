"""Who started this process, from the environments that launchers make."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

from errors import ConfigurationError
from tests.helpers import assert_one_line_error
from tests.vq_gan_3d.conftest import Train
from vq_gan_3d.launch import Launch, find_launch

# What a job of `sbatch --nodes=2 --ntasks-per-node=2` finds in its script, and a task of `srun` in it besides.
JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "0"}
TASK = JOB | {"SLURM_STEP_NUM_TASKS": "4"}
ELASTIC = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("environment", "per_node", "num_nodes", "rank", "cluster"),
    [
        pytest.param({}, 1, 1, 0, None, id="one process"),
        pytest.param({}, 4, 1, 0, None, id="the first, before the others are started"),
        pytest.param({"LOCAL_RANK": "3", "NODE_RANK": "0"}, 4, 1, 3, None, id="started by Lightning"),
        pytest.param({"NODE_RANK": "1"}, 2, 2, 2, None, id="first of the second machine"),
        pytest.param({"NODE_RANK": "1", "LOCAL_RANK": "1"}, 2, 2, 3, None, id="started there by Lightning"),
        pytest.param({"NODE_RANK": "1"}, 1, 1, 0, None, id="a rented machine that has a number"),
        pytest.param(ELASTIC | {"RANK": "3"}, 2, 2, 3, None, id="torchrun"),
        pytest.param(ELASTIC | JOB | {"RANK": "3"}, 2, 2, 3, None, id="torchrun inside SLURM"),
        pytest.param(TASK | {"SLURM_PROCID": "3"}, 2, 2, 3, SLURMEnvironment, id="srun"),
        pytest.param(JOB, 2, 1, 0, LightningEnvironment, id="plainly inside SLURM"),
        pytest.param(JOB | {"LOCAL_RANK": "1"}, 2, 1, 1, LightningEnvironment, id="started by Lightning inside SLURM"),
        pytest.param(JOB | {"SLURM_STEP_NUM_TASKS": "1"}, 2, 1, 0, LightningEnvironment, id="srun with one task"),
    ],
)
def test_rank_and_cluster(
    environment: dict[str, str], per_node: int, num_nodes: int, rank: int, cluster: type | None
) -> None:
    launch = find_launch(environment, per_node, num_nodes)
    assert (launch.rank, launch.world_size) == (rank, per_node * num_nodes)
    assert launch.cluster is None if cluster is None else type(launch.cluster) is cluster


@pytest.mark.parametrize(
    ("environment", "per_node", "num_nodes", "words"),
    [
        (ELASTIC | {"RANK": "0"}, 1, 1, ["torchrun started 4", "asks for 1", "--nproc_per_node=1"]),
        (TASK, 1, 1, ["srun started 4", "asks for 1", "--ntasks-per-node=1"]),
        (TASK, 4, 1, ["--nodes=1", "--ntasks-per-node=4"]),
        ({key: TASK[key] for key in TASK if key != "SLURM_NTASKS_PER_NODE"}, 2, 2, ["--ntasks-per-node=2"]),
        ({}, 2, 2, ["hardware.num_nodes=2", "NODE_RANK"]),
        (JOB, 2, 2, ["hardware.num_nodes=2", "NODE_RANK"]),
    ],
)
def test_what_does_not_fit_is_refused(
    environment: dict[str, str], per_node: int, num_nodes: int, words: list[str]
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        find_launch(environment, per_node, num_nodes)
    assert all(word in str(caught.value) for word in words), caught.value


def test_lightning_must_count_alike() -> None:
    trainer: Any = SimpleNamespace(global_rank=0, world_size=2)
    Launch(0, 2, None).check(trainer)
    for launch in (Launch(1, 2, None), Launch(0, 1, None)):
        with pytest.raises(ConfigurationError, match="start with torchrun"):
            launch.check(trainer)


def test_a_run_in_a_job_script_of_several_tasks_trains_by_itself(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning alone takes the job's number of tasks for its processes."""
    for key, value in (JOB | {"SLURM_NODEID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_NAME": "mine"}).items():
        monkeypatch.setenv(key, value)
    train("training.max_steps=1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    refused = train("training.max_steps=1", "output_dir=other", check=2)
    assert_one_line_error(refused, "this process 1 of 1", "LOCAL_RANK")
