"""Starting ranks on several machines through DeepSpeed's own launcher and its host file.

DeepSpeed's classes build the command of each launcher that it knows: pdsh, Open MPI, MPICH, MVAPICH and Slurm reach the
other machines by themselves; with `nossh` the same command is run on every machine, with its `machine_rank`.
paceline's variables and the script's arguments are packed into one argument, so that no shell on the way expands them.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import paceline.launch.worker as worker_module
from paceline.config import DeepSpeedPlugin
from paceline.errors import ConfigError, MissingExtraError, Problem, UsageError, counted
from paceline.launch.command import check_command
from paceline.launch.planning import client_variables, engine_variables, reject_nested_launch, thread_variables
from paceline.launch.schedulers.external_launcher import raise_for_exit, run_launcher
from paceline.launch.worker import pack

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from paceline.config import Resolved
    from paceline.launch.command import Command

__all__ = ["DeepSpeedPlan", "launch_deepspeed", "plan_deepspeed"]

_DEFAULT_HOSTFILE = "/job/hostfile"
_DEFAULT_PORT = 29500
_SECTION = "deepspeed_config"
_WORKER = worker_module.__file__
_PROGRAMS = {"pdsh": "pdsh", "openmpi": "mpirun", "mpich": "mpirun", "mvapich": "mpirun", "slurm": "srun"}


@dataclass(frozen=True, slots=True)
class DeepSpeedPlan:
    """What a launch over a host file will start.

    Attributes:
        launcher: The name of DeepSpeed's launcher.
        hosts: Number of ranks per machine, in the order of their ranks.
        command: The command line to run here.
        variables: Variables of that command in addition to this environment.
        worker: The command line of each rank.
        shared: Variables of each rank.
        stop: The command that stops the ranks on all machines; empty where the launcher itself does so on a signal.
    """

    launcher: str
    hosts: Mapping[str, int]
    command: tuple[str, ...]
    variables: Mapping[str, str]
    worker: tuple[str, ...]
    shared: Mapping[str, str]
    stop: tuple[str, ...] = ()

    def as_text(self) -> str:
        """Return the plan as text, with a command that a shell could run."""
        count, machines = sum(self.hosts.values()), len(self.hosts)
        lines = [
            f"{count} processes on {counted(machines, 'machine')}, started by {self.launcher}:",
            *(f"  {host} slots={slots}" for host, slots in self.hosts.items()),
            "for all:",
            *(f"  {name}={shlex.quote(value)}" for name, value in sorted(self.shared.items())),
            "each rank:",
            f"  {shlex.join(self.worker)}",
            "here:",
        ]
        own = "".join(f"{name}={shlex.quote(value)} " for name, value in self.variables.items())
        return "\n".join([*lines, f"  {own}{shlex.join(self.command)}"])

    def __str__(self) -> str:
        return self.as_text()


def plan_deepspeed(resolved: Resolved, command: Command, env: Mapping[str, str]) -> DeepSpeedPlan:
    """Check what can be checked here, and plan the launch.

    Raises:
        ConfigError: The host file, its filters and the configuration contradict each other; the error lists every
            problem.
        UsageError: The script, module or program does not exist, or this process is itself a launched rank.
        MissingExtraError: DeepSpeed is not installed.
    """
    reject_nested_launch(env)
    check_command(command, env)
    runner = _import_runner()
    config, plugin = resolved.config, resolved.config.deepspeed_config or DeepSpeedPlugin()
    pool, active = _read_hosts(runner, resolved, plugin)
    hosts = {host: len(slots) for host, slots in active.items()}
    problems = list(_problems(resolved, hosts))
    if problems:
        raise ConfigError(problems)
    address = config.main_process_ip or next(iter(hosts))
    port = config.main_process_port or _DEFAULT_PORT
    shared = {
        **engine_variables(config),
        **client_variables(resolved, sum(hosts.values()), env),
        **thread_variables(config, max(hosts.values()), env),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "PACELINE_CONFIG": resolved.to_json(),
    }
    kind = () if command.kind == "script" else (f"--{command.kind}",)
    script = str(Path(command.script).absolute()) if command.kind == "script" else command.script
    worker = (*kind, script, *command.arguments)
    arguments = runner.parse_args(
        [
            *("--launcher", plugin.deepspeed_multinode_launcher.replace("nossh", "pdsh")),
            *("--hostfile", plugin.deepspeed_hostfile or _DEFAULT_HOSTFILE),
            *("--include", plugin.deepspeed_inclusion_filter or ""),
            *("--exclude", plugin.deepspeed_exclusion_filter or ""),
            *("--master_addr", address, "--master_port", str(port), "--no_local_rank"),
            # By path: the command builders for Slurm and MPICH accept scripts only.
            *(_WORKER, "--packed", pack(shared, worker)),
        ]
    )
    line, variables, stop = _command(runner, arguments, resolved, pool, active, env)
    return DeepSpeedPlan(
        launcher=plugin.deepspeed_multinode_launcher,
        hosts=hosts,
        command=tuple(line),
        variables=variables,
        worker=(sys.executable, _WORKER, *worker),
        shared=shared,
        stop=tuple(stop),
    )


def _import_runner() -> Any:
    try:
        from deepspeed.launcher import runner
    except ImportError as error:
        raise MissingExtraError("deepspeed", "deepspeed", "deepspeed_multinode_launcher") from error
    return runner


def _read_hosts(runner: Any, resolved: Resolved, plugin: DeepSpeedPlugin) -> tuple[Any, Any]:
    """All machines with their slots, and those that the filters keep, with the indices of their slots."""
    path = plugin.deepspeed_hostfile or _DEFAULT_HOSTFILE
    key = f"{_SECTION}.deepspeed_hostfile"
    where = resolved.origin(key).where if plugin.deepspeed_hostfile else ""
    if not Path(path).is_file():
        what = f"there is no host file {path}"
        hint = 'name a file with a line such as "worker-1 slots=8" for each machine'
        raise ConfigError([Problem(where, key, what, "DeepSpeed's launcher reads the machines from it", hint)])
    try:
        pool = runner.fetch_hostfile(path)
    except ValueError as error:
        hint = 'write a line such as "worker-1 slots=8" for each machine'
        raise ConfigError([Problem(where, key, f"{path} cannot be used: {error}", "", hint)]) from error
    include, exclude = plugin.deepspeed_inclusion_filter or "", plugin.deepspeed_exclusion_filter or ""
    try:
        return pool, runner.parse_inclusion_exclusion(pool, include, exclude)
    except ValueError as error:
        name = "deepspeed_inclusion_filter" if include else "deepspeed_exclusion_filter"
        what = f"{include or exclude!r} does not fit {path}: {error}"
        hint = 'write it like "worker-1@worker-2:0,2", and set only one of the two filters'
        where = resolved.origin(f"{_SECTION}.{name}").where
        raise ConfigError([Problem(where, f"{_SECTION}.{name}", what, "", hint)]) from error


def _problems(resolved: Resolved, hosts: Mapping[str, int]) -> Iterator[Problem]:
    config, total = resolved.config, sum(hosts.values())
    why = f"the host file and its filters select {len(hosts)} machines with {total} slots"
    if config.num_machines not in (1, len(hosts)):
        where = resolved.origin("num_machines").where
        yield Problem(where, "num_machines", f"{config.num_machines} contradicts it", why, f"set it to {len(hosts)}")
    count = config.num_processes
    if count not in (None, total) and resolved.origin("num_processes").is_explicit:
        where = resolved.origin("num_processes").where
        yield Problem(where, "num_processes", f"{count} contradicts it", why, f"set it to {total}, or remove it")
    if not 0 <= config.machine_rank < len(hosts):
        where = resolved.origin("machine_rank").where
        yield Problem(where, "machine_rank", f"{config.machine_rank} is out of range", why, "count from 0")


def _command(
    runner: Any, arguments: Any, resolved: Resolved, pool: Any, active: Any, env: Mapping[str, str]
) -> tuple[list[str], dict[str, str], list[str]]:
    """The command to run here, its own variables, and the command that stops the ranks on other machines."""
    world = runner.encode_world_info(active)
    plugin = resolved.config.deepspeed_config or DeepSpeedPlugin()
    if plugin.deepspeed_multinode_launcher == "nossh" or len(active) == 1:
        line = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}"]
        line += [f"--master_addr={arguments.master_addr}", f"--master_port={arguments.master_port}"]
        line += [f"--node_rank={resolved.config.machine_rank}", "--no_local_rank"]
        return [*line, arguments.user_script, *arguments.user_args], {}, []
    made = _launcher(runner, arguments, resolved, world, pool, active)
    python_path = os.pathsep.join([str(Path.cwd()), *filter(None, [env.get("PYTHONPATH")])])
    passed = {**env, "PYTHONPATH": python_path}
    prefixes = (*runner.EXPORT_ENVS, *runner.get_accelerator().export_envs())
    for name, value in passed.items():
        if name.startswith(prefixes):
            made.add_export(name, value)
    try:
        answer = made.get_cmd(dict(passed), active)
    except ValueError as error:
        where = resolved.origin(f"{_SECTION}.deepspeed_multinode_launcher").where
        raise ConfigError([Problem(where, f"{_SECTION}.deepspeed_multinode_launcher", str(error))]) from error
    line, stop, environment = answer if isinstance(answer, tuple) else (answer, [], passed)
    own = {name: value for name, value in environment.items() if env.get(name) != value}
    return [word for word in line if word], own, stop


def _launcher(runner: Any, arguments: Any, resolved: Resolved, world: str, pool: Any, active: Any) -> Any:
    cls = {
        "pdsh": runner.PDSHRunner,
        "openmpi": runner.OpenMPIRunner,
        "mpich": runner.MPICHRunner,
        "mvapich": runner.MVAPICHRunner,
        "slurm": runner.SlurmRunner,
    }[arguments.launcher]
    try:
        cls.validate_active_resources(active)
        return cls(arguments, world) if cls is runner.PDSHRunner else cls(arguments, world, pool)
    except ValueError as error:
        key = f"{_SECTION}.deepspeed_multinode_launcher"
        hint = "use pdsh or nossh, or name the wanted machines in the host file"
        raise ConfigError([Problem(resolved.origin(key).where, key, str(error), "", hint)]) from error


def launch_deepspeed(resolved: Resolved, command: Command, *, env: Mapping[str, str]) -> None:
    """Run `command` on every machine of the host file and return when all ranks have exited with code 0.

    Raises:
        WorkerError: A rank failed, or a signal came; it carries the exit code.
        UsageError: The launcher's program is not installed. Nothing was started.
    """
    planned = plan_deepspeed(resolved, command, env)
    program = _PROGRAMS.get(planned.launcher)
    if planned.command[0] == program and shutil.which(program, path=env.get("PATH")) is None:
        raise UsageError(
            f"There is no program {program!r} in PATH",
            f"deepspeed_multinode_launcher {planned.launcher} starts the ranks on other machines with it",
            "Install it, or choose nossh and run the same command on every machine, each with its machine_rank",
        )
    environment = {**env, **planned.variables}
    code, received = run_launcher(planned.command, environment, planned.stop)
    raise_for_exit(planned.launcher, code, received)
