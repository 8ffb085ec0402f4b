"""The decision after an attempt, from how the ranks of all machines exited: the same on every machine."""

from __future__ import annotations

import json
import signal
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from paceline.errors import PREEMPTED, counted, named
from paceline.launch.failures import (
    FailureRecord,
    RankExit,
    exit_code,
    first_failure,
    report,
    summarize_others,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.launch.planning import LaunchPlan
    from paceline.launch.supervision import AttemptOutcome

__all__ = ["PREEMPTED_TEXT", "Decision", "MachineExit", "decide"]

PREEMPTED_TEXT = "preempted: the state is saved; run the script again to resume, with its flag for that if it has one\n"
"""The report on a run that exited with `PREEMPTED`."""


@dataclass(frozen=True, slots=True)
class MachineExit:
    """How an attempt ended on one machine.

    Attributes:
        host: The machine's name.
        ranks: How many ranks it had.
        ends: How each exited; empty after a signal, or when the machine was lost.
        signal: The signal that its launcher received and forwarded.
        lost: Why it stopped responding; empty when it reported its end.
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
        """Return one line of JSON, which `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> MachineExit:
        """Read what `to_json` wrote."""
        data: dict[str, Any] = json.loads(text)
        ends = tuple(RankExit(**{**end, "record": _record(end["record"])}) for end in data.pop("ends"))
        return cls(**data, ends=ends)


def _record(data: dict[str, Any] | None) -> FailureRecord | None:
    return None if data is None else FailureRecord(**data)


@dataclass(frozen=True, slots=True)
class Decision:
    """What follows from an attempt.

    Attributes:
        kind: "done", "restart" after a failure, "regroup" with more machines, or "end".
        text: The report.
        code: The exit code that goes with "end".
    """

    kind: Literal["done", "restart", "regroup", "end"]
    text: str = ""
    code: int = 0

    def to_json(self) -> str:
        """Return one line of JSON, which `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Decision:
        """Read what `to_json` wrote."""
        return cls(**json.loads(text))


def decide(machines: Sequence[MachineExit], *, may_restart: bool, regroup: bool = False) -> Decision:
    """Decide what follows from how the ranks exited.

    Args:
        machines: Every machine of the attempt.
        may_restart: Whether failed ranks may be started again, on the machines that are left.
        regroup: Whether the ranks were stopped because another machine wants to join.
    """
    for machine in machines:
        if machine.signal is not None:
            return Decision("end", _signal_text(machines, machine.host, machine.signal), 128 + machine.signal)
    ends = [end for machine in machines for end in machine.ends]
    lost = [machine for machine in machines if machine.lost]
    decision = None if lost else _decide_without_failure(ends, regroup)
    if decision is not None:
        return decision
    text, code = _failure(ends, lost)
    return Decision("restart" if may_restart else "end", text, code)


def _decide_without_failure(ends: Sequence[RankExit], regroup: bool) -> Decision | None:
    if regroup and not any(map(_failed_by_itself, ends)):
        return Decision("regroup")
    if ends and all(map(_was_preempted, ends)):
        return Decision("end", PREEMPTED_TEXT, PREEMPTED)
    return None if any(map(_failed, ends)) else Decision("done")


def _failed(end: RankExit) -> bool:
    return end.code != 0 and not end.stopped


def _was_preempted(end: RankExit) -> bool:
    return end.code == PREEMPTED


def _failed_by_itself(end: RankExit) -> bool:
    """Whether a rank failed, and neither another rank nor a request to save and exit explains it."""
    is_expected = end.code in (0, PREEMPTED, -signal.SIGTERM)
    return not (is_expected or end.stopped or end.is_secondary)


def _signal_text(machines: Sequence[MachineExit], host: str, number: int) -> str:
    count = sum(machine.ranks for machine in machines)
    name = signal.Signals(number).name
    where = f" on {host}" if len(machines) > 1 else ""
    return f"stopped by {name}{where}; {'its process has' if count == 1 else f'all {count} processes have'} ended\n"


def _failure(ends: Sequence[RankExit], lost: Sequence[MachineExit]) -> tuple[str, int]:
    """The report, with what happened first at its end, and the exit code."""
    gone = "".join(
        f"{machine.host} is lost with its {counted(machine.ranks, 'rank')}: {machine.lost}\n" for machine in lost
    )
    if not any(map(_failed, ends)):
        return gone, 1
    cause = first_failure(ends)
    if lost and cause.is_secondary:  # the lost machine took the others with it
        return f"{summarize_others(ends, named([machine.host for machine in lost]))}{gone}", 1
    return f"{gone}{report(ends)}", exit_code(cause)
