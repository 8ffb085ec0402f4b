"""Becoming one rank of a job whose tasks a scheduler started: the script replaces this process."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from paceline.launch.clusters.cluster import check_against
from paceline.launch.command import check_command
from paceline.launch.planning import client_variables, command_line, engine_variables, thread_variables

if TYPE_CHECKING:
    from collections.abc import Mapping

    from paceline.config import Resolved
    from paceline.environment.world import World
    from paceline.launch.clusters.cluster import Cluster
    from paceline.launch.command import Command

__all__ = ["TaskPlan", "plan_task", "run_task"]


@dataclass(frozen=True, slots=True)
class TaskPlan:
    """What this task becomes.

    Attributes:
        scheduler: The scheduler that started the tasks.
        rank: The rank of this task.
        size: The number of ranks.
        command: The command line that replaces the launcher.
        variables: Variables to set in addition to this environment.
    """

    scheduler: str
    rank: int
    size: int
    command: tuple[str, ...]
    variables: Mapping[str, str]

    def as_text(self) -> str:
        """Return the plan as text, with a command that a shell could run."""
        own = [f"  {name}={shlex.quote(value)}" for name, value in sorted(self.variables.items())]
        head = f"rank {self.rank} of {self.size}: {self.scheduler} started a task for each, and this one becomes"
        return "\n".join([head, *own, f"  {shlex.join(self.command)}"])

    def __str__(self) -> str:
        return self.as_text()


def plan_task(resolved: Resolved, command: Command, env: Mapping[str, str], cluster: Cluster) -> TaskPlan:
    """Check what can be checked here, and plan what this task becomes.

    Raises:
        ConfigError: The configuration contradicts the job; the error lists every problem.
        UsageError: The script, module or program does not exist.
    """
    world = cluster.world
    assert world is not None
    check_against(cluster, resolved)
    check_command(command, env)
    shared = {
        **engine_variables(resolved.config),
        **client_variables(resolved, world.size, env),
        **thread_variables(resolved.config, world.local_size, env),
        **_rendezvous_variables(resolved, world),
        "PACELINE_CONFIG": resolved.to_json(),
    }
    return TaskPlan(
        scheduler=cluster.scheduler,
        rank=world.rank,
        size=world.size,
        command=command_line(command),
        variables={name: value for name, value in shared.items() if env.get(name) != value},
    )


def _rendezvous_variables(resolved: Resolved, world: World) -> dict[str, str]:
    """Where the ranks meet. torchrun's other variables stay unset: the scheduler's own give the rank."""
    return {
        "MASTER_ADDR": resolved.config.main_process_ip or world.main_address,
        "MASTER_PORT": str(resolved.config.main_process_port or world.main_port),
    }


def run_task(planned: TaskPlan, env: Mapping[str, str]) -> NoReturn:
    """Replace this process by the rank: signals, output and exit code go to the scheduler."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, planned.command, {**env, **planned.variables})
