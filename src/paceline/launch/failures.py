"""One report on how the ranks exited: the first failure comes last, once, with its own traceback."""

from __future__ import annotations

import json
import re
import signal
import socket
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
    "read_failure_record",
    "read_fatal_location",
    "report",
    "summarize_others",
]

_ABORTED = (
    "A library in the process aborted and printed the reason to stderr. gloo aborts when ranks are in different "
    "collectives, or pass different sizes to one: with --debug, paceline compares the ranks before each of its own "
    "collectives and names the one that differs"
)
# The methods of the facade are what a script calls.
_FACADE = Path(__file__).parents[1] / "accelerator"
# Characters of an exception's first sentence in the summary of ranks that did not cause the failure; where it is longer
# only the type is shown, since a cut sentence would end anywhere.
_SUMMARY_WIDTH = 200


@dataclass(frozen=True, slots=True)
class FailureRecord:
    """What a failing process wrote to its error file.

    Attributes:
        kind: "exception", "exit" (sys.exit), "interrupt", or "hang" (ranks waited for others that did not arrive).
        code: The process's exit code.
        headline: The exception's type and message.
        traceback: The whole traceback, from the script's first line on.
        where: `file:line` of the innermost line of the user's code; may be empty.
        time: Seconds since the epoch.
        secondary: Whether another rank's exit seems to have caused this failure.
        remark: What the rank knows besides, such as where the others were; may be empty.
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
    """How one process exited.

    Attributes:
        rank: Its rank; within one launcher, its local rank.
        pid: Its process ID.
        code: Its return code as in `subprocess`: negative for a signal.
        time: When it was last seen alive, in seconds since the epoch.
        stopped: Whether the launcher stopped it.
        record: What it wrote to its error file, if anything.
        hint: What the launcher adds, such as the use of host memory.
        log: The file with its output, unless that went to the console.
        where: `file:line` of the user's code at a fatal signal such as SIGSEGV, and the facade's method that was called
            there, if the process could dump it.
        host: The machine it ran on; empty for this one.
    """

    rank: int
    pid: int
    code: int
    time: float
    stopped: bool = False
    record: FailureRecord | None = None
    hint: str = ""
    log: str = ""
    where: str = ""
    host: str = ""

    @property
    def is_secondary(self) -> bool:
        """Whether another rank's exit seems to have caused this one."""
        return self.record is not None and self.record.secondary

    @property
    def since(self) -> float:
        """When the failure happened, as precisely as is known."""
        return self.record.time if self.record is not None else self.time


def read_failure_record(path: Path) -> FailureRecord | None:
    """Read an error file in our format or torch elastic's; None when there is none."""
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    fields = data.get("paceline")
    if fields is not None:
        return FailureRecord(**{name: fields[name] for name in FailureRecord.__slots__ if name in fields})
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
    """Return the user's line and the facade's method it had called, from faulthandler's dump at a fatal signal."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    # The dump lists the newest thread first and the main thread last; the one that got the signal is "Current".
    threads = re.split(r"^(?=(?:Current t|T)hread )", text, flags=re.MULTILINE)[1:]
    default = threads[-1] if threads else ""
    thread = next((t for t in threads if t.startswith("Current")), default)
    called = ""
    for file, line, function in re.findall(r'^ *File "(.*)", line (\d+) in (.*)', thread, re.MULTILINE):
        if not is_library(file):
            return f"{file}:{line}{called}"
        is_facade = Path(file).parent == _FACADE and not function.startswith("_")
        called = f", in {function}" if is_facade else ""
    return ""


def first_failure(ends: Sequence[RankExit]) -> RankExit:
    """Return the failure that caused the others: the earliest that is not secondary, else the earliest."""
    failed = [end for end in ends if end.code != 0 and not end.stopped]
    return min(failed, key=lambda end: (end.is_secondary, end.since))


def exit_code(end: RankExit) -> int:
    """Return the code a shell would report: the process's own, or 128 + the signal's number."""
    if end.record is not None and end.code < 0:  # it failed by itself before it was killed
        return end.record.code
    return end.code if end.code > 0 else 128 - end.code


def summarize_others(ends: Sequence[RankExit], cause: str) -> str:
    """Return one line on ranks that did not cause a failure; `cause` names who did."""
    return _others(ends, cause) + "\n"


def report(ends: Sequence[RankExit]) -> str:
    """Return the report: the other ranks in one line, then the first failure with its traceback."""
    cause = first_failure(ends)
    # If no rank failed by itself, nobody knows whose connection was lost.
    name = "another rank" if cause.is_secondary else f"rank {cause.rank}"
    others = _others([end for end in ends if end is not cause], name)
    head = f"rank {cause.rank} on {cause.host or socket.gethostname()} (pid {cause.pid}) {_reason(cause)}"
    if cause.log:
        head += f"; its output is in {cause.log}"
    lines = [*([others] if others else []), head]
    record = cause.record
    if record is not None and record.kind in ("exception", "hang"):
        lines += ["", record.traceback.rstrip("\n")]
    if record is not None and record.remark:
        lines += ["", record.remark]
    elif cause.code == -signal.SIGABRT:
        lines += ["", *_remarks(ends), _ABORTED]
    return "\n".join(lines) + "\n"


def _remarks(ends: Iterable[RankExit]) -> list[str]:
    """The remarks of ranks that lost the connection to an aborted one: in which collective it happened."""
    return [end.record.remark for end in ends if end.record is not None and end.record.remark]


def _reason(end: RankExit) -> str:
    record = end.record
    if record is not None:
        at = f" at {record.where}" if record.where else ""
        match record.kind:
            case "exit":
                argument = record.headline.partition(": ")[2]
                shown = "" if not argument or argument.lstrip("-").isdigit() else f": {argument}"
                return f"exited with code {record.code}{at} (sys.exit{shown})"
            case "interrupt":
                return f"was interrupted{at} (KeyboardInterrupt)"
            case "hang":
                return "found ranks waiting for others that do not arrive, and all were stopped"
            case _:
                return f"raised {record.headline.partition(':')[0] or 'an exception'}{at}"
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


def _others(ends: Iterable[RankExit], cause: str) -> str:
    """Summarize the ranks that did not cause the failure in one line; `cause` names who did."""
    groups: dict[str, list[int]] = {}
    for end in ends:
        if end.stopped:
            what = "stopped by the launcher"
        elif end.code == 0:
            what = "had finished"
        elif end.record is not None and end.record.kind == "hang":
            what = "stopped too"
        elif end.record is not None:
            how = f"lost the connection to {cause}" if end.is_secondary else "failed too"
            what = f"{how} ({_short(end.record.headline)})"
        else:
            what = _reason(end)
        groups.setdefault(what, []).append(end.rank)
    return "; ".join(f"{named_ranks(numbers)}: {what}" for what, numbers in groups.items())


def _short(headline: str) -> str:
    """Return the first sentence, without the location in C++ source that native errors begin with.

    Of an exception whose first sentence is too long only the type is left.
    """
    text = re.sub(r"\[/[^\]]*\]\s*", "", headline).partition("\n")[0]
    sentence = re.split(r"(?<=[.!?])\s", text, maxsplit=1)[0].rstrip(".: ")
    return sentence if len(sentence) <= _SUMMARY_WIDTH else sentence.partition(":")[0]
