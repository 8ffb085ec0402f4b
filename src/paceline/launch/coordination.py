"""Coordinators: what to start on this machine in each attempt, and what follows from how the attempt ended.

`SingleNodeCoordinator` decides by itself; `MultiNodeCoordinator` (in `rendezvous`) agrees with other launchers.
"""

from __future__ import annotations

import socket
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

from torch._C._distributed_c10d import TCPStore
from torch.distributed import DistError

from paceline.errors import WorldError, first_line
from paceline.launch.decision import Decision, MachineExit, decide
from paceline.launch.planning import plan

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from paceline.config import Resolved
    from paceline.launch.command import Command
    from paceline.launch.planning import LaunchPlan
    from paceline.launch.supervision import AttemptOutcome, RemoteRequest

__all__ = ["Attempt", "Coordinator", "SingleNodeCoordinator"]

_STORE_TIMEOUT = timedelta(seconds=20)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One start of all ranks.

    Attributes:
        plan: What this machine starts.
        port: The port of the store in which the ranks meet.
        run_id: The same on all ranks and in all attempts.
        number: How often the ranks were started before.
        remote_request: Returns what other machines request meanwhile.
    """

    plan: LaunchPlan
    port: int
    run_id: str
    number: int
    remote_request: Callable[[], RemoteRequest]


class Coordinator(Protocol):
    """Tells a launcher what to start, and what follows from how that ended."""

    def next(self) -> Attempt:
        """Return what to start now."""

    def conclude(self, outcome: AttemptOutcome) -> Decision:
        """Return what follows from how this machine's ranks exited."""

    def close(self) -> None:
        """Close the store and end all threads."""


class SingleNodeCoordinator:
    """Coordinator for one machine: the launcher hosts the store of its own ranks."""

    def __init__(self, resolved: Resolved, command: Command, env: Mapping[str, str]) -> None:
        self._plan = plan(resolved, command, env)
        self._run_id = uuid.uuid4().hex[:12]
        self._num_attempts = 0
        self._store: TCPStore | None = None

    def next(self) -> Attempt:
        """Return the plan with a new store."""
        self._store = None  # frees the port of the last one
        self._store = _open_store(self._plan.address, self._plan.port)
        self._num_attempts += 1
        return Attempt(self._plan, self._store.port, self._run_id, self._num_attempts - 1, lambda: "")

    def conclude(self, outcome: AttemptOutcome) -> Decision:
        """Decide from the ranks of this machine."""
        end = MachineExit.of(outcome, socket.gethostname(), self._plan)
        return decide([end], may_restart=self._num_attempts <= self._plan.max_restarts)

    def close(self) -> None:
        """Close the store."""
        self._store = None


def _open_store(address: str, port: int) -> TCPStore:
    try:
        return TCPStore(address, port, is_master=True, wait_for_workers=False, timeout=_STORE_TIMEOUT)
    except DistError as error:
        reason = first_line(error)
        raise WorldError(
            f"The launcher cannot listen at {address}:{port or '(a free port)'} ({reason})",
            "The address is not this machine's, or another program has just taken the port",
            "Leave main_process_ip and main_process_port out: one machine needs neither",
        ) from error
