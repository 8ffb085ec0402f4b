"""Starting ranks on CPUs through mpirun, on this machine or those of a host file.

Each rank reads its rank from the variables that MPI sets. paceline's own variables are packed into one argument, so
that it does not matter which variables an mpirun forwards.
"""

from __future__ import annotations

import random
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import paceline.launch.worker as worker_module
from paceline.environment.world import DEFAULT_PORT
from paceline.errors import PREEMPTED, ConfigError, Problem, UsageError, WorkerError, counted
from paceline.launch.command import check_command
from paceline.launch.decision import PREEMPTED_TEXT
from paceline.launch.network import port_error
from paceline.launch.planning import client_variables, engine_variables, reject_nested_launch, thread_variables
from paceline.launch.schedulers.external_launcher import raise_for_exit, run_launcher
from paceline.launch.worker import pack

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from paceline.config import Resolved, RunConfig
    from paceline.launch.command import Command

__all__ = ["MpirunPlan", "launch_mpirun", "plan_mpirun"]

_WORKER = worker_module.__file__
_SECTION = "mpirun_config"
_PORTS = (12_000, 32_000)
_TRIES = 20


@dataclass(frozen=True, slots=True)
class MpirunPlan:
    """What a launch through mpirun will start.

    Attributes:
        size: Number of ranks.
        command: The command line to run here.
        worker: The command line of each rank.
        shared: Variables of each rank besides those of MPI.
    """

    size: int
    command: tuple[str, ...]
    worker: tuple[str, ...]
    shared: Mapping[str, str]

    def as_text(self) -> str:
        """Return the plan as text, with a command that a shell could run."""
        lines = [
            f"{counted(self.size, 'process')}, started by mpirun",
            "for all:",
            *(f"  {name}={shlex.quote(value)}" for name, value in sorted(self.shared.items())),
            "each rank:",
            f"  {shlex.join(self.worker)}",
            "here:",
            f"  {shlex.join(self.command)}",
        ]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.as_text()


def plan_mpirun(resolved: Resolved, command: Command, env: Mapping[str, str]) -> MpirunPlan:
    """Check what can be checked here, and plan the launch.

    Raises:
        ConfigError: The host file and the configuration contradict each other; the error lists every problem.
        UsageError: There is no mpirun, the script, module or program does not exist, or this process is itself a
            launched rank.
    """
    reject_nested_launch(env)
    check_command(command, env)
    problems = list(_problems(resolved))
    if problems:
        raise ConfigError(problems)
    program, is_open_mpi = _find_mpirun(env)
    config = resolved.config
    size = config.num_processes or 1
    shared = {
        **engine_variables(config),
        **client_variables(resolved, size, env),
        **thread_variables(config, -(-size // config.max_machines), env),
        "MASTER_ADDR": _main_address(config),
        "MASTER_PORT": str(config.main_process_port or _open_port()),
        "PACELINE_CONFIG": resolved.to_json(),
    }
    if config.mpirun_config is not None and config.mpirun_config.ccl is not None:
        shared["CCL_WORKER_COUNT"] = str(config.mpirun_config.ccl)
    kind = () if command.kind == "script" else (f"--{command.kind}",)
    script = str(Path(command.script).absolute()) if command.kind == "script" else command.script
    worker = (*kind, script, *command.arguments)
    options = _open_mpi_options(config, env) if is_open_mpi else _hydra_options(config)
    return MpirunPlan(
        size=size,
        command=(program, "-n", str(size), *options, sys.executable, _WORKER, "--packed", pack(shared, worker)),
        worker=(sys.executable, _WORKER, *worker),
        shared=shared,
    )


def _open_mpi_options(config: RunConfig, env: Mapping[str, str]) -> Iterator[str]:
    if config.mpirun_config is not None and config.mpirun_config.hostfile:
        yield from ("--hostfile", config.mpirun_config.hostfile)
    if config.max_machines > 1:
        yield from ("--map-by", f"ppr:{(config.num_processes or 1) // config.max_machines}:node")
    # By default it binds each rank to one core, whatever the number of threads.
    yield from ("--bind-to", "none")
    if env.get("PYTHONPATH"):
        yield from ("-x", "PYTHONPATH")


def _hydra_options(config: RunConfig) -> Iterator[str]:
    """Options of Intel MPI, MPICH and MVAPICH2, which share a launcher."""
    if config.mpirun_config is not None and config.mpirun_config.hostfile:
        yield from ("-f", config.mpirun_config.hostfile)
    if config.max_machines > 1:
        yield from ("-ppn", str((config.num_processes or 1) // config.max_machines))


def _problems(resolved: Resolved) -> Iterator[Problem]:
    config = resolved.config
    path = config.mpirun_config.hostfile if config.mpirun_config is not None else None
    if path is not None and not _hosts(path):
        key = f"{_SECTION}.mpirun_hostfile"
        what = f"{path} names no machines" if Path(path).is_file() else f"there is no host file {path}"
        hint = 'write a line such as "node1 slots=8" (Open MPI) or "node1:8" (Intel MPI, MPICH) for each machine'
        yield Problem(resolved.origin(key).where, key, what, "mpirun reads the machines from it", hint)
    if path is not None and not resolved.origin("num_processes").is_explicit:
        why = "the devices of this machine do not tell those of the others"
        todo = "set it to the number of ranks on all machines"
        yield Problem("", "num_processes", "it is required with a host file", why, todo)
    elif (config.num_processes or 1) % config.max_machines:
        what = f"{config.num_processes} is not divisible by {config.max_machines} machines"
        yield Problem(resolved.origin("num_processes").where, "num_processes", what, "all get the same number", "")


def _hosts(path: str) -> list[str]:
    """Return the machines of a host file; in both formats a line starts with the name."""
    if not Path(path).is_file():
        return []
    lines = (line.partition("#")[0].split() for line in Path(path).read_text(encoding="utf-8").splitlines())
    return [words[0].partition(":")[0] for words in lines if words]


def _main_address(config: RunConfig) -> str:
    if config.main_process_ip:
        return config.main_process_ip
    path = config.mpirun_config.hostfile if config.mpirun_config is not None else None
    hosts = _hosts(path) if path is not None else []
    return hosts[0] if len(set(hosts)) > 1 else "127.0.0.1"


def _open_port() -> int:
    """Return a free port below the ephemeral range: two launches at once get different ones."""
    ports = (random.randrange(*_PORTS) for _ in range(_TRIES))
    return next((port for port in ports if port_error(port) is None), DEFAULT_PORT)


def _find_mpirun(env: Mapping[str, str]) -> tuple[str, bool]:
    """Return the program, and whether it is Open MPI's."""
    for name in ("mpirun", "mpiexec"):
        program = shutil.which(name, path=env.get("PATH"))
        if program is not None:
            version = subprocess.run(
                [program, "--version"], env=env, text=True, capture_output=True, check=False
            ).stdout
            return program, "Open MPI" in version or "OpenRTE" in version
    raise UsageError(
        "There is no program 'mpirun' or 'mpiexec' in PATH",
        f"With {_SECTION}, mpirun starts the ranks",
        f"Install Open MPI, Intel MPI, MPICH or MVAPICH2, or remove {_SECTION}",
    )


def launch_mpirun(resolved: Resolved, command: Command, *, env: Mapping[str, str]) -> None:
    """Run `command` on every rank and return when all have exited with code 0.

    Raises:
        WorkerError: A rank failed, or a signal came; it carries the exit code.
        ConfigError: The host file and the configuration contradict each other. Nothing was started.
        UsageError: There is no mpirun, or no script, module or program of that name. Nothing was started.
    """
    code, received = run_launcher(plan_mpirun(resolved, command, env).command, env)
    if code == PREEMPTED:
        raise WorkerError(PREEMPTED_TEXT, PREEMPTED)
    raise_for_exit("mpirun", code, received)
