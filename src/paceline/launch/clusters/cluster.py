"""What a scheduler says, as settings of a launch, and where the configuration says otherwise."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from paceline.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from paceline.config import Detected, Resolved
    from paceline.environment.world import World

__all__ = ["Cluster", "check_against"]

_FIXED = ("num_machines", "machine_rank", "num_processes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The job that this process is a task of.

    Attributes:
        scheduler: Its name.
        task: What each task of the job is: a machine, on which the launcher starts ranks, or one rank.
        values: Settings that follow, by configuration key.
        world: Under `task="rank"`, which rank this is.
    """

    scheduler: str
    task: Literal["machine", "rank"]
    values: Mapping[str, Detected] = field(default_factory=dict)
    world: World | None = None


def check_against(cluster: Cluster, resolved: Resolved) -> None:
    """Raise `ConfigError` where somebody asked for another number of machines or ranks than the job has."""
    problems = list(_contradictions(cluster, resolved))
    if problems:
        raise ConfigError(problems)


def _contradictions(cluster: Cluster, resolved: Resolved) -> Iterator[Problem]:
    for key in _FIXED:
        found, asked = cluster.values.get(key), resolved.origin(key)
        value = getattr(resolved.config, key)
        if found is not None and asked.is_explicit and value != found.value:
            what = f"{value} contradicts {found.value} by {found.where}"
            why = "the job has as many machines and tasks as its scheduler started"
            yield Problem(asked.where, key, what, why, f"leave {key} out, or ask {cluster.scheduler} for other numbers")
    if cluster.task == "rank":
        for key in ("max_restarts", "enable_cpu_affinity"):
            value, asked = getattr(resolved.config, key), resolved.origin(key)
            if value and asked.is_explicit:
                what = f"{str(value).lower()} is not used"
                why = f"each task of {cluster.scheduler} is a rank, which no launcher of ours starts"
                yield Problem(asked.where, key, what, why, "start one task on each machine, or leave it out")
