"""Detection of the scheduler that started this process, from its variables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from paceline.config import Detected
from paceline.environment.world import World, WorldSource
from paceline.launch.clusters.cluster import Cluster
from paceline.launch.clusters.kubernetes import read_kubernetes

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["detect_cluster"]

# By source: the scheduler's name, and its variables for the number of ranks, this machine and the machines.
_VARIABLES: Final[Mapping[WorldSource, tuple[str, str, str, str]]] = {
    "slurm": ("Slurm", "SLURM_STEP_NUM_TASKS", "SLURM_NODEID", "SLURM_STEP_NUM_NODES"),
    "openmpi": ("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "pmi": ("MPI", "PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS"),
}


def detect_cluster(env: Mapping[str, str]) -> Cluster | None:
    """Return the job that this process is a task of; None unless a scheduler started it as one of several.

    Under Slurm, one task on each of several machines is a launcher there; several tasks per machine are ranks.
    Under MPI every task is a rank. In a pod of a PyTorchJob or TrainJob the launcher starts the pod's ranks.

    Raises:
        WorldError: Variables are missing, not numbers, or contradict each other; the error names them.
    """
    pod = read_kubernetes(env)
    if pod is not None or any(env.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return pod
    world = World.read(env)
    if world.size == 1 or world.source not in _VARIABLES:
        return None
    scheduler, size, machine, machines = _VARIABLES[world.source]
    values = {
        "num_machines": Detected(world.num_nodes, f"{scheduler} ({machines})"),
        "machine_rank": Detected(world.node_rank, f"{scheduler} ({machine})"),
        **_rendezvous_endpoint(env, scheduler, world),
    }
    if world.source == "slurm" and world.size == world.num_nodes:
        return Cluster(scheduler=scheduler, task="machine", values=values)
    values["num_processes"] = Detected(world.size, f"{scheduler} ({size})")
    return Cluster(scheduler=scheduler, task="rank", values=values, world=world)


def _rendezvous_endpoint(env: Mapping[str, str], scheduler: str, world: World) -> dict[str, Detected]:
    address = "MASTER_ADDR" if env.get("MASTER_ADDR") else f"{scheduler} (the job's first machine)"
    port = "MASTER_PORT" if env.get("MASTER_PORT") else f"{scheduler} (from the job ID)"
    return {
        "main_process_ip": Detected(world.main_address, address),
        "main_process_port": Detected(world.main_port, port),
    }
