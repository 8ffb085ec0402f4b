"""The rounds of a launch: ranks start together, end together, and what follows is one verdict.

`Alone` is one machine; `MultiNodeRounds` (in `together.py`) agrees with the launchers of the others.
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
from paceline.launch.planning import plan
from paceline.launch.verdict import MachineEnd, Verdict, judge

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from paceline.config import Resolved
    from paceline.launch.command import Command
    from paceline.launch.planning import Plan
    from paceline.launch.supervision import Outcome, RemoteRequest

__all__ = ["Alone", "Round", "Rounds"]

_STORE_PATIENCE = timedelta(seconds=20)


@dataclass(frozen=True, slots=True)
class Round:
    """One start of all ranks.

    Attributes:
        plan: What this machine starts.
        port: Where the ranks meet.
        run_id: The same on all ranks and in all rounds.
        number: How often ranks were started before.
        remote_request: What happens on other machines meanwhile.
    """

    plan: Plan
    port: int
    run_id: str
    number: int
    remote_request: Callable[[], RemoteRequest]


class Rounds(Protocol):
    """Where a launcher learns what to start, and what follows from how that ended."""

    def next(self) -> Round:
        """Return what to start now."""

    def conclude(self, outcome: Outcome) -> Verdict:
        """Say what follows from how this machine's ranks ended."""

    def close(self) -> None:
        """Leave nothing open."""


class Alone:
    """One machine: the launcher hosts the store of its own ranks."""

    def __init__(self, resolved: Resolved, command: Command, env: Mapping[str, str]) -> None:
        self._plan = plan(resolved, command, env)
        self._run_id = uuid.uuid4().hex[:12]
        self._started = 0
        self._store: TCPStore | None = None

    def next(self) -> Round:
        """Return the plan with a store of its own."""
        self._store = None  # the port of the last one must be free
        self._store = _open_store(self._plan.address, self._plan.port)
        self._started += 1
        return Round(self._plan, self._store.port, self._run_id, self._started - 1, lambda: "")

    def conclude(self, outcome: Outcome) -> Verdict:
        """Judge the ranks of this machine."""
        end = MachineEnd.of(outcome, socket.gethostname(), self._plan)
        return judge([end], may_restart=self._started <= self._plan.max_restarts)

    def close(self) -> None:
        """Close the store."""
        self._store = None


def _open_store(address: str, port: int) -> TCPStore:
    try:
        return TCPStore(address, port, is_master=True, wait_for_workers=False, timeout=_STORE_PATIENCE)
    except DistError as error:
        reason = first_line(error)
        raise WorldError(
            f"The ranks cannot meet at {address}:{port or '(a free port)'} ({reason})",
            "The address is not this machine's, or another program took the port this moment",
            "Leave main_process_ip and main_process_port out: one machine needs neither",
        ) from error
