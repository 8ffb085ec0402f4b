"""The rank of this process and the world size, read once from the launcher's variables into a frozen value."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from paceline.errors import WorldError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["DEFAULT_PORT", "World", "WorldSource", "first_host"]

DEFAULT_PORT = 29500

WorldSource = Literal["none", "torchrun", "slurm", "openmpi", "pmi"]


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The rank of this process, the world size, and where the ranks meet.

    Attributes:
        rank: Global rank of this process, from 0.
        size: Number of processes.
        local_rank: Rank of this process on its machine, from 0.
        local_size: Number of processes on this machine.
        node_rank: Index of this machine, from 0.
        num_nodes: Number of machines.
        source: The launcher or scheduler whose variables were read.
        main_address: Host of rank 0.
        main_port: Port at which the ranks meet.
        run_id: ID of the job, the same on all ranks.
        restart_count: How often the launcher has restarted the ranks.
        max_restarts: How often it would; 0 if unknown.
        use_agent_store: Whether the launcher itself listens at the port, so that rank 0 must not.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node_rank: int = 0
    num_nodes: int = 1
    source: WorldSource = "none"
    main_address: str = "127.0.0.1"
    main_port: int = DEFAULT_PORT
    run_id: str = "none"
    restart_count: int = 0
    max_restarts: int = 0
    use_agent_store: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """Whether this is the first rank of its machine."""
        return self.local_rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this is the highest rank."""
        return self.rank == self.size - 1

    @classmethod
    def read(cls, env: Mapping[str, str]) -> World:
        """Read the variables of torchrun, MPI or Slurm, in that order; without any there is one process.

        Args:
            env: The environment.

        Returns:
            The world.

        Raises:
            WorldError: Variables are missing, not numbers, or contradict each other; the error names them.
        """
        for reader in (_read_torchrun, _read_openmpi, _read_pmi, _read_slurm):
            world = reader(env)
            if world is not None:
                _check(world)
                return world
        return cls()


def _read_torchrun(env: Mapping[str, str]) -> World | None:
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    missing = [name for name in needed if not env.get(name)]
    if len(missing) == len(needed):
        return None
    if missing:
        given = [f"{name}={env[name]}" for name in needed if env.get(name)]
        raise WorldError(
            f"{', '.join(given)} {_is_or_are(given)} set but {' and '.join(missing)} {_is_or_are(missing)} not",
            "A process needs all of RANK, WORLD_SIZE and LOCAL_RANK",
            "Start the script with `paceline launch` or torchrun, which set them all, "
            f"or unset {', '.join(name for name in needed if env.get(name))} to run one process",
        )
    rank, size, local_rank = (_integer(env, name) for name in needed)
    # DeepSpeed's launcher sets the same three, and uses its own names for the rest.
    local_size = _integer(env, "LOCAL_WORLD_SIZE", _integer(env, "LOCAL_SIZE", size))
    return World(
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        node_rank=_integer(env, "GROUP_RANK", _integer(env, "CROSS_RANK", rank // max(local_size, 1))),
        num_nodes=_integer(env, "GROUP_WORLD_SIZE", _integer(env, "CROSS_SIZE", _ceil_div(size, local_size))),
        source="torchrun",
        main_address=_main_address(env, one_machine=local_size >= size),
        main_port=_port(env, DEFAULT_PORT),
        run_id=env.get("TORCHELASTIC_RUN_ID") or "none",
        restart_count=_integer(env, "TORCHELASTIC_RESTART_COUNT", 0),
        max_restarts=_integer(env, "TORCHELASTIC_MAX_RESTARTS", 0),
        use_agent_store=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _read_openmpi(env: Mapping[str, str]) -> World | None:
    if not env.get("OMPI_COMM_WORLD_SIZE"):
        return None
    needed = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
    _require(env, needed, "OMPI_COMM_WORLD_SIZE", "mpirun")
    size = _integer(env, "OMPI_COMM_WORLD_SIZE")
    rank, local_rank, local_size = (_integer(env, name) for name in needed)
    job = env.get("PMIX_NAMESPACE") or env.get("OMPI_MCA_ess_base_jobid") or ""
    return _mpi_world(env, "openmpi", rank, size, local_rank, local_size, job)


# Intel MPI and MPICH set PMI_* and MPI_LOCAL*; MVAPICH2 sets MV2_COMM_WORLD_*.
_PMI_NAMES = (
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    (
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
)


def _read_pmi(env: Mapping[str, str]) -> World | None:
    for rank_name, size_name, local_rank_name, local_size_name in _PMI_NAMES:
        if not env.get(size_name):
            continue
        size = _integer(env, size_name)
        # srun sets PMI_* without the local numbers; Slurm's own variables have them.
        if not env.get(local_rank_name) and (size == 1 or _in_slurm_step(env)):
            continue
        needed = (rank_name, local_rank_name, local_size_name)
        _require(env, needed, size_name, "mpirun")
        rank, local_rank, local_size = (_integer(env, name) for name in needed)
        # The others have no variable that is the same on all ranks and differs between jobs: PMI_ID numbers ranks.
        return _mpi_world(env, "pmi", rank, size, local_rank, local_size, env.get("I_MPI_HYDRA_UUID", ""))
    return None


def _mpi_world(
    env: Mapping[str, str],
    source: WorldSource,
    rank: int,
    size: int,
    local_rank: int,
    local_size: int,
    job: str,
) -> World:
    return World(
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        node_rank=rank // max(local_size, 1),
        num_nodes=_ceil_div(size, local_size),
        source=source,
        main_address=_main_address(env, one_machine=local_size >= size),
        main_port=_port(env, _derived_port(zlib.crc32(job.encode())) if job else DEFAULT_PORT),
        run_id=job or "none",
    )


def _read_slurm(env: Mapping[str, str]) -> World | None:
    if not _in_slurm_step(env):
        return None
    _require(env, ("SLURM_PROCID", "SLURM_LOCALID"), "SLURM_STEP_ID", "srun")
    rank = _integer(env, "SLURM_PROCID")
    size = _slurm_tasks(env)
    node_rank = _integer(env, "SLURM_NODEID", 0)
    num_nodes = _integer(env, "SLURM_STEP_NUM_NODES", _integer(env, "SLURM_NNODES", 1))
    tasks = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or ""
    per_node: tuple[int, ...] = ()
    if tasks:
        per_node = _tasks_per_node(tasks)
    local_size = per_node[node_rank] if node_rank < len(per_node) else _ceil_div(size, num_nodes)
    job, step = _integer(env, "SLURM_JOB_ID", 0), _integer(env, "SLURM_STEP_ID")
    return World(
        rank=rank,
        size=size,
        local_rank=_integer(env, "SLURM_LOCALID"),
        local_size=local_size,
        node_rank=node_rank,
        num_nodes=num_nodes,
        source="slurm",
        main_address=_main_address(env, one_machine=num_nodes == 1),
        main_port=_port(env, _derived_port(7 * job + step)),
        run_id=f"{job}.{step}",
        restart_count=_integer(env, "SLURM_RESTART_COUNT", 0),
    )


def _in_slurm_step(env: Mapping[str, str]) -> bool:
    """Whether srun started this process as one of several tasks; a shell inside an allocation is not."""
    return bool(env.get("SLURM_STEP_ID")) and _slurm_tasks(env) > 1


def _slurm_tasks(env: Mapping[str, str]) -> int:
    return _integer(env, "SLURM_STEP_NUM_TASKS", _integer(env, "SLURM_NTASKS", 1))


def _tasks_per_node(text: str) -> tuple[int, ...]:
    """Read Slurm's `2(x3),1` as (2, 2, 2, 1)."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\(x(\d+)\))?\s*", part)
        if match is None:
            raise WorldError(
                f"SLURM_TASKS_PER_NODE is {text!r}",
                f"{part!r} is not a count such as 2 or 2(x3)",
                "Start the tasks with srun, or set RANK, WORLD_SIZE and LOCAL_RANK yourself",
            )
        counts.extend([int(match[1])] * int(match[2] or 1))
    return tuple(counts)


def first_host(nodelist: str) -> str:
    """Return the first host of a Slurm node list such as `rack[1-2]node[01-04,07],other`."""
    depth = 0
    head = nodelist
    for position, letter in enumerate(nodelist):
        depth += {"[": 1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            head = nodelist[:position]
            break
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", head).strip()


def _main_address(env: Mapping[str, str], *, one_machine: bool) -> str:
    """Return the host of rank 0: MASTER_ADDR, the first host of the allocation, or this one."""
    given = env.get("MASTER_ADDR")
    if given:
        return given
    if one_machine:
        return "127.0.0.1"
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    if nodes:
        return first_host(nodes)
    raise WorldError(
        "The processes are on several machines and MASTER_ADDR is not set",
        "They cannot connect without the host name of rank 0",
        "Set MASTER_ADDR to that host name for every process, with mpirun: `-x MASTER_ADDR=<host>` "
        "or `-genv MASTER_ADDR <host>`",
    )


def _port(env: Mapping[str, str], default: int) -> int:
    port = _integer(env, "MASTER_PORT", default)
    if not 0 < port < 65536:
        raise WorldError(
            f"MASTER_PORT is {port}",
            "A port is a number from 1 to 65535",
            "Set it to a free port, or unset it",
        )
    return port


def _derived_port(number: int) -> int:
    """Give every job its own port, below the ephemeral port range."""
    return 12000 + number % 20000


def _integer(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name, "")
    if not text and default is not None:
        return default
    try:
        return int(text)
    except ValueError as error:
        raise WorldError(
            f"{name} is {text!r}", "It must be a whole number", f"Unset {name}, or let the launcher set it"
        ) from error


def _require(env: Mapping[str, str], needed: tuple[str, ...], known: str, launcher: str) -> None:
    missing = [name for name in needed if not env.get(name)]
    if missing:
        raise WorldError(
            f"{known}={env[known]} is set but {' and '.join(missing)} {_is_or_are(missing)} not",
            f"Without {'it' if len(missing) == 1 else 'them'} this process does not know its rank and device",
            f"Start the script with {launcher} and let it set its variables, or use `paceline launch`",
        )


def _check(world: World) -> None:
    problems = [
        f"{name} {number} of {count}"
        for name, number, count in (
            ("rank", world.rank, world.size),
            ("local rank", world.local_rank, world.local_size),
            ("node rank", world.node_rank, world.num_nodes),
        )
        if not 0 <= number < count
    ]
    if world.local_size > world.size:
        problems.append(f"{world.local_size} processes on this machine of {world.size} in all")
    if world.restart_count < 0:
        problems.append(f"restart count {world.restart_count}")
    if problems:
        raise WorldError(
            f"The variables of {world.source} are inconsistent: {'; '.join(problems)}",
            "Ranks count from 0 and are below the number of processes",
            "Let one launcher set all of them; a leftover `export` is the usual cause",
        )


def _ceil_div(number: int, by: int) -> int:
    return -(-number // max(by, 1))


def _is_or_are(names: list[str]) -> str:
    if len(names) == 1:
        return "is"
    return "are"
