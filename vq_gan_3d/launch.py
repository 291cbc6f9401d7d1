"""How this process was started among those that train together, and what Lightning must be told about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytorch_lightning as pl
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

from errors import ConfigurationError


@dataclass(frozen=True)
class Launch:
    """The place of this process.

    Attributes:
        rank: its number among all processes of all machines; 0 writes logs and checkpoints.
        world_size: number of all of them.
        cluster: for Lightning's Trainer; None: Lightning finds the right one by itself.
    """

    rank: int
    world_size: int
    cluster: ClusterEnvironment | None

    def check(self, trainer: pl.Trainer) -> None:
        """See that Lightning counts processes as the data are split.

        Raises:
            ConfigurationError: it does not, under a launcher that we do not know.
        """
        if (trainer.global_rank, trainer.world_size) != (self.rank, self.world_size):
            raise ConfigurationError(
                f"hardware.* makes this process {self.rank} of {self.world_size}, its launcher {trainer.global_rank} "
                f"of {trainer.world_size}: start with torchrun, with srun, or plainly without LOCAL_RANK, NODE_RANK"
            )


def find_launch(environment: Mapping[str, str], per_node: int, num_nodes: int) -> Launch:
    """Tell from the environment who started this process.

    That is torchrun, ``srun`` with several tasks, or Lightning itself, which starts the others of its machine. The last
    also inside an allocation of SLURM: there Lightning would take the allocation's number of tasks for processes that
    somebody started.

    Args:
        environment: ``os.environ``.
        per_node: processes on each machine that the configuration asks for.
        num_nodes: machines.

    Raises:
        ConfigurationError: others were started than the configuration asks for, or a machine has no number.
    """
    world = per_node * num_nodes
    if "TORCHELASTIC_RUN_ID" in environment:
        started = int(environment["WORLD_SIZE"])
        if started != world:
            raise ConfigurationError(
                f"torchrun started {started} processes, hardware.* asks for {world}: give --nnodes={num_nodes} "
                f"--nproc_per_node={per_node}, or change hardware.num_nodes and hardware.device"
            )
        return Launch(int(environment["RANK"]), world, None)
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1:
        if tasks != world or environment.get("SLURM_NTASKS_PER_NODE") != str(per_node):
            raise ConfigurationError(
                f"srun started {tasks} tasks, hardware.* asks for {world} processes: give srun --nodes={num_nodes} "
                f"--ntasks-per-node={per_node}, or change hardware.num_nodes and hardware.device"
            )
        # checkpoints and signals are ours: Lightning's requeue would resume from a file of its own
        return Launch(int(environment["SLURM_PROCID"]), world, SLURMEnvironment(auto_requeue=False))
    node = 0
    if num_nodes > 1:
        if "NODE_RANK" not in environment:
            raise ConfigurationError(
                f"hardware.num_nodes={num_nodes}, but nothing says which machine this is: start with torchrun or srun, "
                "or set NODE_RANK, MASTER_ADDR and MASTER_PORT on each"
            )
        node = int(environment["NODE_RANK"])
    rank = node * per_node + int(environment.get("LOCAL_RANK", "0"))
    return Launch(rank, world, LightningEnvironment() if "SLURM_NTASKS" in environment else None)
