"""From how the ranks ended to one report: the first failure last, with its own traceback, once."""

from __future__ import annotations

import json
import re
import signal
import socket
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["Account", "RankEnd", "exit_code", "first_failure", "fold", "read_account", "report"]

# Letters that a rank which did not cause the failure gets.
_FOLDED = 120


@dataclass(frozen=True, slots=True)
class Account:
    """What a failing process wrote about itself.

    Attributes:
        kind: "exception", "exit" (sys.exit) or "interrupt".
        code: The exit code that goes with it.
        headline: The exception's own line.
        traceback: The whole traceback, from the script's first line on.
        where: `file:line` of the innermost line of the user's code; may be empty.
        time: Seconds since the epoch.
        secondary: It looks as if another rank's end caused this one.
    """

    kind: str
    code: int
    headline: str
    traceback: str
    where: str
    time: float
    secondary: bool


@dataclass(frozen=True, slots=True)
class RankEnd:
    """How one process ended.

    Attributes:
        code: As `subprocess` gives it: negative for a signal.
        time: When it was last seen alive, in seconds since the epoch.
        stopped: The launcher ended it.
        account: What it wrote about itself, if anything.
        hint: What the launcher knows besides, such as the use of memory.
        log: File with its output, if it did not go to the console.
        host: The machine it ran on; empty for this one.
    """

    rank: int
    pid: int
    code: int
    time: float
    stopped: bool = False
    account: Account | None = None
    hint: str = ""
    log: str = ""
    host: str = ""

    @property
    def is_secondary(self) -> bool:
        """Whether another rank's end seems to have caused this one."""
        return self.account is not None and self.account.secondary

    @property
    def since(self) -> float:
        """When the failure happened, as well as is known."""
        return self.account.time if self.account is not None else self.time


def read_account(path: Path) -> Account | None:
    """Read what a process left in its error file, ours or torch elastic's own; None when there is nothing."""
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    ours = data.get("paceline")
    if ours is not None:
        return Account(**{name: ours[name] for name in Account.__slots__})
    message = data.get("message")
    if not isinstance(message, dict):
        return None
    extra = message.get("extraInfo", {})
    return Account(
        kind="exception",
        code=1,
        headline=str(message.get("message", "")),
        traceback=str(extra.get("py_callstack", "")),
        where="",
        time=float(extra.get("timestamp", 0)),
        secondary=False,
    )


def first_failure(ends: Sequence[RankEnd]) -> RankEnd:
    """Return the failure that caused the others: not one that looks caused by another, then the earliest."""
    failed = [end for end in ends if end.code != 0 and not end.stopped]
    return min(failed, key=lambda end: (end.is_secondary, end.since))


def exit_code(end: RankEnd) -> int:
    """Return what a shell would give: the process's own code, 128 + the signal's number for a signal."""
    if end.account is not None and end.code < 0:  # it had failed by itself before it was killed
        return end.account.code
    return end.code if end.code > 0 else 128 - end.code


def fold(ends: Sequence[RankEnd]) -> str:
    """Write how ranks ended that did not cause a failure."""
    return _others(ends) + "\n"


def report(ends: Sequence[RankEnd]) -> str:
    """Write the report: the other ranks in one line, then the first failure with its traceback."""
    cause = first_failure(ends)
    others = _others([end for end in ends if end is not cause])
    head = f"rank {cause.rank} on {cause.host or socket.gethostname()} (pid {cause.pid}) {_reason(cause)}"
    if cause.log:
        head += f"; its output is in {cause.log}"
    lines = [*([others] if others else []), head]
    if cause.account is not None and cause.account.kind == "exception":
        lines += ["", cause.account.traceback.rstrip("\n")]
    return "\n".join(lines) + "\n"


def _reason(end: RankEnd) -> str:
    account = end.account
    if account is not None:
        at = f" at {account.where}" if account.where else ""
        match account.kind:
            case "exit":
                return f"exited with code {account.code}{at} (sys.exit)"
            case "interrupt":
                return f"was interrupted{at} (KeyboardInterrupt)"
            case _:
                return f"raised {account.headline.partition(':')[0] or 'an exception'}{at}"
    if end.code < 0:
        hint = f" ({end.hint})" if end.hint else ""
        return f"was killed by {_signal_name(-end.code)}{hint}"
    return f"exited with code {end.code} without a Python error (os._exit, or a program that failed)"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _others(ends: Iterable[RankEnd]) -> str:
    """Fold the ranks that did not cause the failure into one line."""
    groups: dict[str, list[int]] = {}
    for end in ends:
        if end.stopped:
            what = "stopped by the launcher"
        elif end.code == 0:
            what = "had finished"
        elif end.account is not None:
            how = "lost touch with it" if end.is_secondary else "failed too"
            what = f"{how} ({_short(end.account.headline)})"
        else:
            what = _reason(end)
        groups.setdefault(textwrap.shorten(what, _FOLDED, placeholder="…)"), []).append(end.rank)
    return "; ".join(f"{_ranks(numbers)}: {what}" for what, numbers in groups.items())


def _short(headline: str) -> str:
    """Leave out the place in a library's own source that native errors begin with."""
    return re.sub(r"\[/[^\]]*\]\s*", "", headline)


def _ranks(numbers: Sequence[int]) -> str:
    """Write [0, 2, 3, 4] as `ranks 0, 2-4`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"rank{'s' if len(numbers) > 1 else ''} {text}"
