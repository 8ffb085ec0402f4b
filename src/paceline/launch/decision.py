"""From how the ranks of all machines ended to what happens next: the same on every machine."""

from __future__ import annotations

import json
import signal
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from paceline.errors import PREEMPTED
from paceline.launch.failures import FailureRecord, RankExit, exit_code, first_failure, fold, report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.launch.planning import LaunchPlan
    from paceline.launch.supervision import AttemptOutcome

__all__ = ["PREEMPTED_TEXT", "Decision", "MachineExit", "decide"]

PREEMPTED_TEXT = "made room as asked: the state was saved, start again to go on\n"
"""What is said of a run that ended with `PREEMPTED`."""


@dataclass(frozen=True, slots=True)
class MachineExit:
    """How one machine's part of a round ended.

    Attributes:
        host: The machine.
        ranks: How many ranks it had.
        ends: How each ended; empty when a signal came, or when the machine was lost.
        signal: That the launcher got and handed on.
        lost: Why nothing more was heard from it; empty when it told its end.
    """

    host: str
    ranks: int
    ends: tuple[RankExit, ...] = ()
    signal: int | None = None
    lost: str = ""

    @classmethod
    def of(cls, outcome: AttemptOutcome, host: str, planned: LaunchPlan) -> MachineExit:
        """Take the outcome of this machine's launcher, which counts its ranks from 0."""
        ends = tuple(replace(end, host=host, rank=planned.first + end.rank) for end in outcome.ends)
        return cls(host, len(planned.ranks), ends, outcome.signal)

    def to_json(self) -> str:
        """Write it as one line, which `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> MachineExit:
        """Read what `to_json` wrote."""
        data: dict[str, Any] = json.loads(text)
        ends = tuple(RankExit(**{**end, "account": _account(end["account"])}) for end in data.pop("ends"))
        return cls(**data, ends=ends)


def _account(data: dict[str, Any] | None) -> FailureRecord | None:
    return None if data is None else FailureRecord(**data)


@dataclass(frozen=True, slots=True)
class Decision:
    """What follows.

    Attributes:
        kind: "done", "again" after a failure, "regroup" with other machines, or "end".
        text: The report.
        code: The exit code that goes with "end".
    """

    kind: Literal["done", "again", "regroup", "end"]
    text: str = ""
    code: int = 0

    def to_json(self) -> str:
        """Write it as one line, which `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Decision:
        """Read what `to_json` wrote."""
        return cls(**json.loads(text))


def decide(machines: Sequence[MachineExit], *, may_restart: bool, regroup: bool = False) -> Decision:
    """Say what follows from how the machines ended.

    Args:
        machines: Every machine of the round.
        may_restart: Ranks that failed may be started again, with the machines that are left.
        regroup: The ranks were ended because another machine wants to take part.
    """
    ends = [end for machine in machines for end in machine.ends]
    lost = [machine for machine in machines if machine.lost]
    preempted = bool(ends) and not lost and all(end.code == PREEMPTED for end in ends)
    stopped = next((machine for machine in machines if machine.signal is not None), None)
    failed = any(end.code != 0 and not end.stopped for end in ends)
    if stopped is not None and stopped.signal is not None:
        return Decision("end", _stopped_text(machines, stopped), 128 + stopped.signal)
    if regroup and not lost and not _failed_otherwise(ends):
        return Decision("regroup", "")
    if preempted:
        return Decision("end", PREEMPTED_TEXT, PREEMPTED)
    if not failed and not lost:
        return Decision("done")
    text, code = _failure(ends, lost)
    return Decision("again" if may_restart else "end", text, code)


def _failed_otherwise(ends: Sequence[RankExit]) -> bool:
    """Whether a rank failed, and not because ranks were asked to save and end."""
    own = [end for end in ends if end.code not in (0, PREEMPTED, -signal.SIGTERM) and not end.stopped]
    return any(not end.is_secondary for end in own)


def _stopped_text(machines: Sequence[MachineExit], stopped: MachineExit) -> str:
    count = sum(machine.ranks for machine in machines)
    name = signal.Signals(stopped.signal or 0).name
    where = f" on {stopped.host}" if len(machines) > 1 else ""
    return f"stopped by {name}{where}; {'its process has' if count == 1 else f'all {count} processes have'} ended\n"


def _failure(ends: Sequence[RankExit], lost: Sequence[MachineExit]) -> tuple[str, int]:
    """The report, with what happened first at its end, and the exit code."""
    gone = "".join(
        f"{machine.host} is lost with its {machine.ranks} rank{'s' if machine.ranks != 1 else ''}: {machine.lost}\n"
        for machine in lost
    )
    failures = [end for end in ends if end.code != 0 and not end.stopped]
    if not failures:
        return gone, 1
    cause = first_failure(ends)
    if lost and cause.is_secondary:  # the lost machine took the others with it
        return f"{fold(ends)}{gone}", 1
    return f"{gone}{report(ends)}", exit_code(cause)
