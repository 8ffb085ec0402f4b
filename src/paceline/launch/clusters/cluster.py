"""The job of a scheduler as settings of a launch, and the check that the configuration agrees with them."""

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
        scheduler: The scheduler's name, for messages.
        task: What each task of the job is: a machine, on which the launcher starts ranks, or one rank.
        values: Settings that the job determines, by configuration key.
        world: With `task="rank"`, the rank that this process is.
    """

    scheduler: str
    task: Literal["machine", "rank"]
    values: Mapping[str, Detected] = field(default_factory=dict)
    world: World | None = None


def check_against(cluster: Cluster, resolved: Resolved) -> None:
    """Raise `ConfigError` where the configuration sets another number of machines or ranks than the job has."""
    problems = list(_contradictions(cluster, resolved))
    if problems:
        raise ConfigError(problems)


def _contradictions(cluster: Cluster, resolved: Resolved) -> Iterator[Problem]:
    for key in _FIXED:
        of_job, origin = cluster.values.get(key), resolved.origin(key)
        value = getattr(resolved.config, key)
        if of_job is not None and origin.is_explicit and value != of_job.value:
            what = f"{value} contradicts {of_job.value} from {of_job.where}"
            why = "the scheduler decides how many machines and tasks the job has"
            yield Problem(
                origin.where, key, what, why, f"remove {key}, or request other numbers from {cluster.scheduler}"
            )
    if cluster.task == "rank":
        for key in ("max_restarts", "enable_cpu_affinity"):
            value, origin = getattr(resolved.config, key), resolved.origin(key)
            if value and origin.is_explicit:
                what = f"{str(value).lower()} would be ignored"
                why = f"each task of {cluster.scheduler} is a rank, which paceline does not start"
                yield Problem(origin.where, key, what, why, f"start one task per machine, or remove {key}")
