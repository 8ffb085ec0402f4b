"""The plan of a launch: the processes of this machine and their variables, checked and printable before the start."""

from __future__ import annotations

import shlex
import shutil
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from paceline.config import Origin
from paceline.environment.host import core_count
from paceline.environment.world import DEFAULT_PORT, World
from paceline.errors import ConfigError, Problem, UsageError, WorldError, counted
from paceline.launch.accelerate_variables import accelerate_variables, installed_target
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
    "client_variables",
    "command_line",
    "engine_variables",
    "local_size",
    "performance_hints",
    "plan",
    "plan_machine",
    "reject_nested_launch",
    "rendezvous_endpoint",
    "thread_variables",
]

_WORKER = "paceline.launch.worker"


@dataclass(frozen=True, slots=True)
class PlannedRank:
    """One process: its command line and its own variables."""

    rank: int
    command: tuple[str, ...]
    variables: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """What a launch will start on this machine.

    Attributes:
        ranks: One entry per process.
        variables: Variables of all processes that differ from the launcher's environment.
        address: Host of the store in which the ranks meet.
        port: Its port; 0 stands for a free one, chosen at the start.
        max_restarts: How often failed ranks are restarted.
        machine: Index of this machine.
        machines: Number of ranks of each machine, as far as this one knows.
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
        """Return the plan as JSON-compatible values."""
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
        """Return the plan as text, with commands that a shell could run once the port is chosen."""
        count = len(self.ranks)
        port = f"port {self.port}" if self.port else "a free port"
        machine = f"machine {self.machine} of {len(self.machines)}" if len(self.machines) > 1 else "this machine"
        lines = [f"{counted(count, 'process')} on {machine}, meeting at {self.address}, {port}"]
        lines.append("for all:")
        lines += [f"  {name}={shlex.quote(value)}" for name, value in sorted(self.variables.items())]
        for rank in self.ranks:
            own = " ".join(f"{name}={shlex.quote(value)}" for name, value in rank.variables.items())
            lines += [f"rank {rank.rank}:", f"  {own} {shlex.join(rank.command)}"]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.as_text()


def plan(resolved: Resolved, command: Command, env: Mapping[str, str]) -> LaunchPlan:
    """Check everything that can be checked without starting a process, and plan the ranks of this machine.

    All machines are assumed to have as many ranks as this one; `plan_machine` takes the real numbers, which are known
    after the rendezvous.

    Raises:
        ConfigError: The configuration does not fit this machine; the error lists every problem.
        UsageError: The script, module or program does not exist, or this process is itself a launched rank.
    """
    reject_nested_launch(env)
    check_command(command, env)
    size = local_size(resolved.config, env)
    problems = list(_problems(resolved, size, env))
    if problems:
        raise ConfigError(problems)
    config = resolved.config
    index = min(config.machine_rank, config.max_machines - 1)
    return plan_machine(resolved, command, env, index, (size,) * config.max_machines)


def local_size(config: RunConfig, env: Mapping[str, str]) -> int:
    """Return the number of ranks of this machine: its share of `num_processes`, or one per device."""
    if config.num_processes is None:
        return int(str(detect(env, config.use_cpu)["num_processes"]))
    return max(1, config.num_processes // config.max_machines)


def performance_hints(config: RunConfig, env: Mapping[str, str]) -> list[str]:
    """Return warnings about settings that work but are probably not intended."""
    size, cores = local_size(config, env), core_count()
    on_cpu = config.use_cpu or count_accelerators()[0] is None
    if on_cpu and size > cores:
        return [f"{size} processes share {cores} CPU cores and take turns; --num_processes {cores} is likely as fast"]
    return []


def rendezvous_endpoint(config: RunConfig, env: Mapping[str, str]) -> tuple[str, int]:
    """Return address and port of the store in which the ranks meet; port 0 stands for a free one."""
    if config.max_machines == 1:
        return config.main_process_ip or "127.0.0.1", config.main_process_port or 0
    port = env.get("MASTER_PORT", "")
    address = config.main_process_ip or env.get("MASTER_ADDR") or ""
    return address, config.main_process_port or (int(port) if port.isdecimal() else DEFAULT_PORT)


def plan_machine(
    resolved: Resolved, command: Command, env: Mapping[str, str], index: int, sizes: tuple[int, ...], **extra: str
) -> LaunchPlan:
    """Plan the ranks of one machine.

    Args:
        resolved: The configuration.
        command: What to run.
        env: The launcher's environment.
        index: Which machine this is.
        sizes: How many ranks each machine has.
        extra: More variables that all of them get.
    """
    total, size, first = sum(sizes), sizes[index], sum(sizes[:index])
    config = resolved.config.changed(num_processes=total)
    origins = dict(resolved.origins)
    if config.max_machines > 1:  # may differ from the configured number: machines differ, join and leave
        origins["num_processes"] = Origin("detected", "the machines that joined")
    resolved = replace(resolved, config=config, origins=origins)
    address, port = rendezvous_endpoint(config, env)
    shared = {
        **_device_variables(config),
        **engine_variables(config),
        **client_variables(resolved, total, env),
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
    """Return the command line of a rank: the worker, which runs the command."""
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
    """Variables that must be set before an engine is imported: DeepSpeed picks its accelerator on import."""
    if config.strategy == "deepspeed" and (config.use_cpu or count_accelerators()[0] is None):
        return {"DS_ACCELERATOR": "cpu"}
    return {}


def client_variables(resolved: Resolved, world_size: int, env: Mapping[str, str]) -> dict[str, str]:
    """Variables that Accelerate's own clients read, such as the Trainer of transformers."""
    target = installed_target(resolved, world_size, count_accelerators()[0])
    return accelerate_variables(resolved, target, env)


def thread_variables(config: RunConfig, size: int, env: Mapping[str, str]) -> dict[str, str]:
    """Divide the cores: by default each of the N processes would start a thread per core."""
    if config.num_cpu_threads_per_process is not None:
        return {"OMP_NUM_THREADS": str(config.num_cpu_threads_per_process)}
    if "OMP_NUM_THREADS" in env:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, core_count() // size))}


def reject_nested_launch(env: Mapping[str, str]) -> None:
    """Raise `UsageError` when this process is already a rank that another launcher started."""
    try:
        world, cluster = World.read(env), detect_cluster(env)
    except WorldError:  # leftovers in a shell; the ranks get variables of their own
        return
    if world.size > 1 and (cluster is None or cluster.task == "rank"):
        raise UsageError(
            f"This process is already rank {world.rank} of {world.size} (from the variables of {world.source})",
            f"Each of the {world.size} processes would launch a run of its own",
            "Run the script itself instead of `paceline launch`: paceline reads these variables",
        )


def _problems(resolved: Resolved, size: int, env: Mapping[str, str]) -> Iterator[Problem]:
    config = resolved.config
    yield from _device_problems(resolved, size)
    if config.max_machines > 1:
        yield from _rendezvous_problems(resolved, env)
    elif config.main_process_port:
        reason = port_error(config.main_process_port)
        if reason is not None:
            yield Problem(
                resolved.origin("main_process_port").where,
                "main_process_port",
                f"port {config.main_process_port} cannot be used: {reason}",
                "the ranks meet there",
                "choose another one, or 0 for a free port",
            )


def _rendezvous_problems(resolved: Resolved, env: Mapping[str, str]) -> Iterator[Problem]:
    config = resolved.config
    if not rendezvous_endpoint(config, env)[0]:
        what = f"it is required with {config.max_machines} machines"
        why = "they meet at machine 0, whose address is unknown"
        hint = "set --main_process_ip to the address of machine 0, on every machine"
        yield Problem(resolved.origin("num_machines").where, "main_process_ip", what, why, hint)
    if config.main_process_port == 0:
        where = resolved.origin("main_process_port").where
        why = "the other machines would not know which port was chosen"
        yield Problem(where, "main_process_port", "0 chooses a free port", why, "choose one port for all machines")


def _device_problems(resolved: Resolved, size: int) -> Iterator[Problem]:
    config = resolved.config
    kind, count = (None, 0) if config.use_cpu else count_accelerators()
    ids = _device_ids(config)
    if kind is None and config.distributed_type == "MULTI_GPU":
        yield Problem(
            resolved.origin("distributed_type").where,
            "distributed_type",
            "MULTI_GPU is requested, but torch finds no GPU that it can use on this machine",
            "DDP would silently run on the CPU",
            "remove it, or run on the CPU with --cpu",
        )
    gpu_ids_problem = _gpu_ids_problem(resolved, kind, ids)
    if gpu_ids_problem is not None:
        yield gpu_ids_problem
    elif kind is not None and size > (len(ids) or count):
        what = f"the {len(ids)} of gpu_ids" if ids else f"the {count} that torch sees"
        yield Problem(
            resolved.origin("num_processes").where,
            "num_processes",
            f"{size} processes are more than the {kind} devices ({what})",
            "each process needs a device of its own",
            f"set num_processes to {len(ids) or count}, or run on the CPU with --cpu",
        )
    if config.enable_cpu_affinity:
        yield from _affinity_problems(resolved, kind, ids)
    yield from _fp8_problems(resolved, kind)


def _fp8_problems(resolved: Resolved, kind: str | None) -> Iterator[Problem]:
    """Report fp8 on a device that is not an NVIDIA GPU, unless it is emulated."""
    config = resolved.config
    if config.as_accelerate:
        # There torchao's layers compute on other devices as well, slowly, as Accelerate lets them.
        return
    emulates = config.fp8_config is not None and config.fp8_config.emulate
    if config.mixed_precision == "fp8" and kind != "cuda" and not emulates:
        what = f"fp8 was requested, but the ranks train on {kind or 'the CPU'}"
        where = resolved.origin("mixed_precision").where
        yield Problem(where, "mixed_precision", what, "fp8 needs an NVIDIA GPU", "use bf16")


def _gpu_ids_problem(resolved: Resolved, kind: str | None, ids: tuple[str, ...]) -> Problem | None:
    config, where = resolved.config, resolved.origin("gpu_ids").where
    if not ids:
        return None
    if kind is None:
        what = f"devices {config.gpu_ids} are requested, but this run uses none"
        why = "use_cpu is set" if config.use_cpu else "torch finds no accelerator on this machine"
        return Problem(where, "gpu_ids", what, why, "remove gpu_ids")
    if visible_devices_variable(kind) is None:
        return Problem(
            where,
            "gpu_ids",
            f"it is not supported for device type {kind}",
            "paceline knows no variable that selects such devices, so that the processes would use others",
            "remove gpu_ids, and select devices with the vendor's own variable",
        )
    return None


def _affinity_problems(resolved: Resolved, kind: str | None, ids: tuple[str, ...]) -> Iterator[Problem]:
    key, gpu_ids = "enable_cpu_affinity", resolved.config.gpu_ids
    where = resolved.origin(key).where
    if kind != "cuda" or shutil.which("numactl") is None:
        why = "pinning needs CUDA devices and the program numactl"
        yield Problem(where, key, "processes cannot be pinned here", why, f"install numactl, or remove {key}")
    elif ids:
        yield Problem(
            where,
            key,
            f"it cannot be combined with gpu_ids {gpu_ids}",
            "pinning follows the device indices that the launcher sees (0, 1, …), not the selected devices",
            f"remove gpu_ids and start with {visible_devices_variable(kind)}={gpu_ids} instead",
        )
