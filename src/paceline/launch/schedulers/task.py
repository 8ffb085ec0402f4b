"""Being one rank of a job whose tasks a scheduler started: the script runs in this process's place."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from paceline.launch.clusters.cluster import check_against
from paceline.launch.command import check_command
from paceline.launch.planning import command_line, engine_variables, thread_variables

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
        scheduler: Who started the tasks.
        rank: Which rank this is.
        size: Of how many.
        command: What runs in the place of the launcher.
        variables: What it gets besides this environment.
    """

    scheduler: str
    rank: int
    size: int
    command: tuple[str, ...]
    variables: Mapping[str, str]

    def as_text(self) -> str:
        """Return the plan as lines that a shell could run."""
        own = [f"  {name}={shlex.quote(value)}" for name, value in sorted(self.variables.items())]
        head = f"rank {self.rank} of {self.size}: {self.scheduler} started a task for each, and this one becomes"
        return "\n".join([head, *own, f"  {shlex.join(self.command)}"])

    def __str__(self) -> str:
        return self.as_text()


def plan_task(resolved: Resolved, command: Command, env: Mapping[str, str], cluster: Cluster) -> TaskPlan:
    """Check what can be checked here, and say what this task becomes.

    Raises:
        ConfigError: The configuration contradicts the job; it holds every problem.
        UsageError: There is nothing to run under that name.
    """
    world = cluster.world
    assert world is not None
    check_against(cluster, resolved)
    check_command(command, env)
    shared = {
        **engine_variables(resolved.config),
        **thread_variables(resolved.config, world.local_size, env),
        **_place(resolved, world),
        "PACELINE_CONFIG": resolved.to_json(),
    }
    return TaskPlan(
        scheduler=cluster.scheduler,
        rank=world.rank,
        size=world.size,
        command=command_line(command),
        variables={name: value for name, value in shared.items() if env.get(name) != value},
    )


def _place(resolved: Resolved, world: World) -> dict[str, str]:
    """The meeting place, and nothing of torchrun's: which rank this is, the scheduler's own variables say."""
    return {
        "MASTER_ADDR": resolved.config.main_process_ip or world.main_address,
        "MASTER_PORT": str(resolved.config.main_process_port or world.main_port),
    }


def run_task(planned: TaskPlan, env: Mapping[str, str]) -> NoReturn:
    """Become the rank: signals, output and the exit code are the scheduler's business from here on."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, planned.command, {**env, **planned.variables})
