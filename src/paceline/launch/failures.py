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

from paceline.errors import named_ranks
from paceline.launch.worker import is_library

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "FailureRecord",
    "RankExit",
    "exit_code",
    "first_failure",
    "fold",
    "read_failure_record",
    "read_fatal_location",
    "report",
]

_ABORTED = (
    "A library in it gave up, and printed why on its standard error. gloo does so when ranks are in "
    "different calls, or bring different sizes to one: with --debug, paceline compares before each of its own "
    "exchanges and names the odd rank"
)
# Public functions of modules directly in the package are what a script calls.
_FACADE = Path(__file__).parents[1]
# Letters that a rank which did not cause the failure gets.
_FOLDED = 120


@dataclass(frozen=True, slots=True)
class FailureRecord:
    """What a failing process wrote about itself.

    Attributes:
        kind: "exception", "exit" (sys.exit), "interrupt", or "hang": ranks waited for others that did not come.
        code: The exit code that goes with it.
        headline: The exception's own line.
        traceback: The whole traceback, from the script's first line on.
        where: `file:line` of the innermost line of the user's code; may be empty.
        time: Seconds since the epoch.
        secondary: It looks as if another rank's end caused this one.
        remark: What the rank found out besides, such as where the others were; may be empty.
    """

    kind: str
    code: int
    headline: str
    traceback: str
    where: str
    time: float
    secondary: bool
    remark: str = ""


@dataclass(frozen=True, slots=True)
class RankExit:
    """How one process ended.

    Attributes:
        code: As `subprocess` gives it: negative for a signal.
        time: When it was last seen alive, in seconds since the epoch.
        stopped: The launcher ended it.
        account: What it wrote about itself, if anything.
        hint: What the launcher knows besides, such as the use of memory.
        log: File with its output, if it did not go to the console.
        where: `file:line` at which a signal such as SIGSEGV found it, and the method of ours that it had called there,
            if it could note that.
        host: The machine it ran on; empty for this one.
    """

    rank: int
    pid: int
    code: int
    time: float
    stopped: bool = False
    account: FailureRecord | None = None
    hint: str = ""
    log: str = ""
    where: str = ""
    host: str = ""

    @property
    def is_secondary(self) -> bool:
        """Whether another rank's end seems to have caused this one."""
        return self.account is not None and self.account.secondary

    @property
    def since(self) -> float:
        """When the failure happened, as well as is known."""
        return self.account.time if self.account is not None else self.time


def read_failure_record(path: Path) -> FailureRecord | None:
    """Read what a process left in its error file, ours or torch elastic's own; None when there is nothing."""
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    ours = data.get("paceline")
    if ours is not None:
        return FailureRecord(**{name: ours[name] for name in FailureRecord.__slots__ if name in ours})
    message = data.get("message")
    if not isinstance(message, dict):
        return None
    extra = message.get("extraInfo", {})
    return FailureRecord(
        kind="exception",
        code=1,
        headline=str(message.get("message", "")),
        traceback=str(extra.get("py_callstack", "")),
        where="",
        time=float(extra.get("timestamp", 0)),
        secondary=False,
    )


def read_fatal_location(path: Path) -> str:
    """Return the user's line, and what of ours it called, from what Python noted when a signal ended a process."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    # Threads are told newest first, the main thread last; the one that got the signal is "Current".
    threads = re.split(r"^(?=(?:Current t|T)hread )", text, flags=re.MULTILINE)[1:]
    told = next((t for t in threads if t.startswith("Current")), threads[-1] if threads else "")
    called = ""
    for file, line, function in re.findall(r'^ *File "(.*)", line (\d+) in (.*)', told, re.MULTILINE):
        if not is_library(file):
            return f"{file}:{line}{called}"
        is_facade = Path(file).parent == _FACADE and not function.startswith("_")
        called = f", in {function}" if is_facade else ""
    return ""


def first_failure(ends: Sequence[RankExit]) -> RankExit:
    """Return the failure that caused the others: not one that looks caused by another, then the earliest."""
    failed = [end for end in ends if end.code != 0 and not end.stopped]
    return min(failed, key=lambda end: (end.is_secondary, end.since))


def exit_code(end: RankExit) -> int:
    """Return what a shell would give: the process's own code, 128 + the signal's number for a signal."""
    if end.account is not None and end.code < 0:  # it had failed by itself before it was killed
        return end.account.code
    return end.code if end.code > 0 else 128 - end.code


def fold(ends: Sequence[RankExit]) -> str:
    """Write how ranks ended that did not cause a failure."""
    return _others(ends) + "\n"


def report(ends: Sequence[RankExit]) -> str:
    """Write the report: the other ranks in one line, then the first failure with its traceback."""
    cause = first_failure(ends)
    others = _others([end for end in ends if end is not cause])
    head = f"rank {cause.rank} on {cause.host or socket.gethostname()} (pid {cause.pid}) {_reason(cause)}"
    if cause.log:
        head += f"; its output is in {cause.log}"
    lines = [*([others] if others else []), head]
    account = cause.account
    if account is not None and account.kind in ("exception", "hang"):
        lines += ["", account.traceback.rstrip("\n")]
    if account is not None and account.remark:
        lines += ["", account.remark]
    elif cause.code == -signal.SIGABRT:
        lines += ["", *_witness(ends), _ABORTED]
    return "\n".join(lines) + "\n"


def _witness(ends: Iterable[RankExit]) -> list[str]:
    """What the ranks that lost touch with one that was aborted say: in which exchange it happened."""
    return [end.account.remark for end in ends if end.account is not None and end.account.remark]


def _reason(end: RankExit) -> str:
    account = end.account
    if account is not None:
        at = f" at {account.where}" if account.where else ""
        match account.kind:
            case "exit":
                said = account.headline.partition(": ")[2]
                words = "" if not said or said.lstrip("-").isdigit() else f": {said}"
                return f"exited with code {account.code}{at} (sys.exit{words})"
            case "interrupt":
                return f"was interrupted{at} (KeyboardInterrupt)"
            case "hang":
                return "found that ranks wait for others that do not come, and all were ended"
            case _:
                return f"raised {account.headline.partition(':')[0] or 'an exception'}{at}"
    if end.code < 0:
        at = f" at {end.where}" if end.where else ""
        hint = f" ({end.hint})" if end.hint else ""
        return f"was killed by {_signal_name(-end.code)}{at}{hint}"
    return f"exited with code {end.code} without a Python error (os._exit, or a program that failed)"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _others(ends: Iterable[RankExit]) -> str:
    """Fold the ranks that did not cause the failure into one line."""
    groups: dict[str, list[int]] = {}
    for end in ends:
        if end.stopped:
            what = "stopped by the launcher"
        elif end.code == 0:
            what = "had finished"
        elif end.account is not None and end.account.kind == "hang":
            what = "ended too"
        elif end.account is not None:
            how = "lost touch with it" if end.is_secondary else "failed too"
            what = f"{how} ({_short(end.account.headline)})"
        else:
            what = _reason(end)
        groups.setdefault(textwrap.shorten(what, _FOLDED, placeholder="…)"), []).append(end.rank)
    return "; ".join(f"{named_ranks(numbers)}: {what}" for what, numbers in groups.items())


def _short(headline: str) -> str:
    """Leave out the place in a library's own source that native errors begin with."""
    return re.sub(r"\[/[^\]]*\]\s*", "", headline)
