"""The plan of a launch: which processes with which variables, checked and printable before any starts."""

from __future__ import annotations

import shlex
import shutil
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from paceline.config import Origin
from paceline.environment.host import core_count
from paceline.environment.world import DEFAULT_PORT, World
from paceline.errors import ConfigError, Problem, UsageError, WorldError
from paceline.launch.accelerators import count_accelerators, detect, visible_devices_variable
from paceline.launch.clusters.detection import detect_cluster
from paceline.launch.command import check_command
from paceline.launch.network import port_error

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from paceline.config import Resolved, RunConfig
    from paceline.launch.command import Command

__all__ = [
    "LaunchPlan",
    "PlannedRank",
    "command_line",
    "engine_variables",
    "local_size",
    "place",
    "plan",
    "reject_nested_launch",
    "rendezvous_endpoint",
    "thread_variables",
]

_WORKER = "paceline.launch.worker"


@dataclass(frozen=True, slots=True)
class PlannedRank:
    """One process: its command line and the variables that only it gets."""

    rank: int
    command: tuple[str, ...]
    variables: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """What a launch will start on this machine.

    Attributes:
        ranks: One entry for each process.
        variables: What all processes get besides, as far as it differs from the launcher's environment.
        address: Where the ranks meet.
        port: The port there; 0 stands for a free one, chosen when the launch begins.
        max_restarts: How often failed ranks are started again.
        machine: Which machine this is.
        machines: How many ranks each machine has, in their order, as far as this one knows.
    """

    ranks: tuple[PlannedRank, ...]
    variables: Mapping[str, str]
    address: str
    port: int
    max_restarts: int = 0
    machine: int = 0
    machines: tuple[int, ...] = (1,)

    @property
    def first(self) -> int:
        """The lowest rank of this machine."""
        return self.ranks[0].rank

    def as_dict(self) -> dict[str, object]:
        """Return the plan as plain values that JSON can hold."""
        return {
            "address": self.address,
            "port": self.port,
            "max_restarts": self.max_restarts,
            "machine": self.machine,
            "machines": list(self.machines),
            "variables": dict(self.variables),
            "ranks": [{"rank": r.rank, "command": list(r.command), "variables": dict(r.variables)} for r in self.ranks],
        }

    def as_text(self) -> str:
        """Return the plan as lines that a shell could run, but for the port while it is not chosen."""
        count = len(self.ranks)
        port = f"port {self.port}" if self.port else "a free port"
        whose = f"machine {self.machine} of {len(self.machines)}" if len(self.machines) > 1 else "this machine"
        lines = [f"{count} process{'es' if count != 1 else ''} on {whose}, meeting at {self.address}, {port}"]
        lines.append("for all:")
        lines += [f"  {name}={shlex.quote(value)}" for name, value in sorted(self.variables.items())]
        for rank in self.ranks:
            own = " ".join(f"{name}={shlex.quote(value)}" for name, value in rank.variables.items())
            lines += [f"rank {rank.rank}:", f"  {own} {shlex.join(rank.command)}"]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.as_text()


def plan(resolved: Resolved, command: Command, env: Mapping[str, str]) -> LaunchPlan:
    """Check everything that can be checked without starting a process, and say what would be started here.

    Of several machines each is taken to have as many ranks as this one; how many the others really have is known
    when they have met, and `place` tells.

    Raises:
        ConfigError: The configuration does not fit this machine; it holds every problem.
        UsageError: There is nothing to run under that name, or this is a launched process itself.
    """
    reject_nested_launch(env)
    check_command(command, env)
    size = local_size(resolved.config, env)
    problems = list(_problems(resolved, size, env))
    if problems:
        raise ConfigError(problems)
    config = resolved.config
    index = min(config.machine_rank, config.max_machines - 1)
    return place(resolved, command, env, index, (size,) * config.max_machines)


def local_size(config: RunConfig, env: Mapping[str, str]) -> int:
    """Return how many ranks this machine starts: its share of `num_processes`, or one for each device."""
    if config.num_processes is None:
        return int(str(detect(env, config.use_cpu)["num_processes"]))
    return max(1, config.num_processes // config.max_machines)


def performance_hints(config: RunConfig, env: Mapping[str, str]) -> list[str]:
    """What works, and is probably not what was meant."""
    size, cores = local_size(config, env), core_count()
    on_cpu = config.use_cpu or count_accelerators()[0] is None
    if on_cpu and size > cores:
        return [f"{size} processes share {cores} CPU cores and take turns; --num_processes {cores} is likely as fast"]
    return []


def rendezvous_endpoint(config: RunConfig, env: Mapping[str, str]) -> tuple[str, int]:
    """Return the address and the port where ranks meet; port 0 stands for a free one."""
    if config.max_machines == 1:
        return config.main_process_ip or "127.0.0.1", config.main_process_port or 0
    port = env.get("MASTER_PORT", "")
    address = config.main_process_ip or env.get("MASTER_ADDR") or ""
    return address, config.main_process_port or (int(port) if port.isdecimal() else DEFAULT_PORT)


def place(
    resolved: Resolved, command: Command, env: Mapping[str, str], index: int, sizes: tuple[int, ...], **extra: str
) -> LaunchPlan:
    """LaunchPlan the ranks of one machine.

    Args:
        resolved: The configuration.
        command: What to run.
        env: The launcher's environment.
        index: Which machine this is.
        sizes: How many ranks each machine has.
        extra: More variables that all of them get.
    """
    total, size, first = sum(sizes), sizes[index], sum(sizes[:index])
    config = resolved.config.model_copy(update={"num_processes": total})
    origins = dict(resolved.origins)
    if config.max_machines > 1:  # what was asked for may be another number: machines differ, come and go
        origins["num_processes"] = Origin("detected", "the machines that take part")
    resolved = replace(resolved, config=config, origins=origins)
    address, port = rendezvous_endpoint(config, env)
    shared = {
        **_device_variables(config),
        **engine_variables(config),
        **thread_variables(config, size, env),
        "GROUP_WORLD_SIZE": str(len(sizes)),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": address,
        "PACELINE_CONFIG": resolved.to_json(),
        "TORCHELASTIC_MAX_RESTARTS": str(config.max_restarts),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(total),
        **({"MASTER_PORT": str(port)} if port else {}),
        **extra,
    }
    line = command_line(command)
    return LaunchPlan(
        ranks=tuple(PlannedRank(first + local, line, _rank_variables(first, local, index)) for local in range(size)),
        variables={name: value for name, value in shared.items() if env.get(name) != value},
        address=address,
        port=port,
        max_restarts=config.max_restarts,
        machine=index,
        machines=sizes,
    )


def command_line(command: Command) -> tuple[str, ...]:
    """Return what a rank runs: our worker, which runs the command."""
    kind = () if command.kind == "script" else (f"--{command.kind}",)
    return (sys.executable, "-m", _WORKER, *kind, command.script, *command.arguments)


def _rank_variables(first: int, local: int, machine: int) -> dict[str, str]:
    return {"RANK": str(first + local), "LOCAL_RANK": str(local), "GROUP_RANK": str(machine)}


def _device_variables(config: RunConfig) -> dict[str, str]:
    ids = _device_ids(config)
    if not ids:
        return {}
    kind, _ = count_accelerators()
    name = visible_devices_variable(kind) if kind is not None else None
    return {name: ",".join(ids)} if name is not None else {}


def _device_ids(config: RunConfig) -> tuple[str, ...]:
    return () if config.gpu_ids in (None, "all") else tuple(str(config.gpu_ids).split(","))


def engine_variables(config: RunConfig) -> dict[str, str]:
    """What an engine must know before it is imported: DeepSpeed takes any accelerator that it finds by then."""
    if config.strategy == "deepspeed" and (config.use_cpu or count_accelerators()[0] is None):
        return {"DS_ACCELERATOR": "cpu"}
    return {}


def thread_variables(config: RunConfig, size: int, env: Mapping[str, str]) -> dict[str, str]:
    """Share the cores out: left alone, each of the N processes would start a thread for every core."""
    if config.num_cpu_threads_per_process is not None:
        return {"OMP_NUM_THREADS": str(config.num_cpu_threads_per_process)}
    if "OMP_NUM_THREADS" in env:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, core_count() // size))}


def reject_nested_launch(env: Mapping[str, str]) -> None:
    """Raise `UsageError` when this process is one of several ranks that something else launched."""
    try:
        world, cluster = World.read(env), detect_cluster(env)
    except WorldError:  # left-overs in a shell; the ranks get variables of their own
        return
    if world.size > 1 and (cluster is None or cluster.task == "rank"):
        raise UsageError(
            f"This is already rank {world.rank} of {world.size} (by the variables of {world.source})",
            f"Each of the {world.size} would start a run of its own",
            "Run the script itself in place of `paceline launch`: paceline reads these variables",
        )


def _problems(resolved: Resolved, size: int, env: Mapping[str, str]) -> Iterator[Problem]:
    config = resolved.config
    yield from _device_problems(resolved, size)
    if config.max_machines > 1:
        yield from _meeting_problems(resolved, env)
    elif config.main_process_port:
        reason = port_error(config.main_process_port)
        if reason is not None:
            yield Problem(
                resolved.origin("main_process_port").where,
                "main_process_port",
                f"the port {config.main_process_port} cannot be used here: {reason}",
                "the ranks meet there",
                "choose another, or 0 for a free one",
            )


def _meeting_problems(resolved: Resolved, env: Mapping[str, str]) -> Iterator[Problem]:
    config = resolved.config
    if not rendezvous_endpoint(config, env)[0]:
        what = f"no address is given at which {config.max_machines} machines could meet"
        why = "they meet at machine 0, and none knows which that is"
        hint = "give --main_process_ip the address of machine 0, on every machine"
        yield Problem(resolved.origin("num_machines").where, "main_process_ip", what, why, hint)
    if config.main_process_port == 0:
        where = resolved.origin("main_process_port").where
        why = "the other machines would not know which one it became"
        yield Problem(where, "main_process_port", "0 takes a free port", why, "choose one port for all machines")


def _device_problems(resolved: Resolved, size: int) -> Iterator[Problem]:
    config, ids = resolved.config, _device_ids(resolved.config)
    kind, count = (None, 0) if config.use_cpu else count_accelerators()
    if kind is None and config.distributed_type == "MULTI_GPU":
        yield Problem(
            resolved.origin("distributed_type").where,
            "distributed_type",
            "MULTI_GPU was asked for, and this machine has no GPU that torch can use",
            "DDP would silently run on the CPU",
            "leave it out, or ask for the CPU with --cpu",
        )
    if ids and kind is None:
        yield Problem(
            resolved.origin("gpu_ids").where,
            "gpu_ids",
            f"devices {config.gpu_ids} were asked for, and this run has none",
            "use_cpu is set" if config.use_cpu else "torch finds no accelerator on this machine",
            "leave gpu_ids out",
        )
    elif ids and visible_devices_variable(str(kind)) is None:
        yield Problem(
            resolved.origin("gpu_ids").where,
            "gpu_ids",
            f"no variable is known that chooses among devices of type {kind}",
            "the processes would use other devices than those",
            "leave gpu_ids out, and hide devices with the vendor's own variable",
        )
    elif kind is not None and size > (len(ids) or count):
        what = f"the {len(ids)} of gpu_ids" if ids else f"the {count} that torch sees"
        yield Problem(
            resolved.origin("num_processes").where,
            "num_processes",
            f"{size} processes, more than {kind} devices ({what})",
            "each process needs a device of its own",
            f"take num_processes {len(ids) or count}, or run on the CPU with --cpu",
        )
    yield from _affinity_problems(resolved, kind, ids)


def _affinity_problems(resolved: Resolved, kind: str | None, ids: tuple[str, ...]) -> Iterator[Problem]:
    config = resolved.config
    if config.enable_cpu_affinity and (kind != "cuda" or shutil.which("numactl") is None):
        yield Problem(
            resolved.origin("enable_cpu_affinity").where,
            "enable_cpu_affinity",
            "processes cannot be pinned to the cores near their device here",
            "that takes CUDA devices and the program numactl",
            "install numactl, or leave enable_cpu_affinity out",
        )
    elif config.enable_cpu_affinity and ids:
        yield Problem(
            resolved.origin("enable_cpu_affinity").where,
            "enable_cpu_affinity",
            f"it is asked for together with gpu_ids {config.gpu_ids}",
            "processes are pinned by the number of the device among those that the launcher sees: near devices "
            "0, 1, … and not near the chosen ones",
            f"leave gpu_ids out and start with {visible_devices_variable(str(kind))}={config.gpu_ids} in its place",
        )
