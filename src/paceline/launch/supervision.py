"""Watching running ranks: who failed first, when to end the others, and that nothing of them stays."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import psutil
from torch.distributed.elastic.multiprocessing import SubprocessContext

from paceline.environment.host import host_memory, oom_kill_count
from paceline.errors import PREEMPTED
from paceline.launch.failures import RankExit, read_failure_record, read_fatal_location

if TYPE_CHECKING:
    from collections.abc import Callable
    from subprocess import Popen
    from types import FrameType
    from typing import Any

    from torch.distributed.elastic.multiprocessing import PContext

    from paceline.launch.rank_logs import RankLogs

__all__ = ["AttemptOutcome", "RemoteRequest", "Signals", "Timeouts", "supervise"]

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)

# A rank that lost its connection is often seen before the one that caused it, which may still be writing its
# traceback or its core. Seconds.
_SETTLE = 3.0
# Signals after which a run may save its state before it ends.
_POLITE = frozenset({signal.SIGTERM, signal.SIGUSR1})
_KILL_PATIENCE = 3
RemoteRequest = Literal["", "end", "save"]


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds.

    Attributes:
        patience: From asking ranks to end to killing them.
        grace: The same after a signal on which they may save their state first.
        interval: Between two looks at them.
    """

    patience: float
    grace: float
    interval: float


@dataclass(frozen=True, slots=True)
class AttemptOutcome:
    """How a launch ended: a signal to the launcher, or the end of each rank."""

    ends: tuple[RankExit, ...] = ()
    signal: int | None = None

    @property
    def failed(self) -> bool:
        """Whether a rank failed."""
        return any(end.code != 0 for end in self.ends)

    @property
    def preempted(self) -> bool:
        """Whether every rank saved its state and ended because it was asked to."""
        return bool(self.ends) and all(end.code == PREEMPTED for end in self.ends)


class Signals:
    """The signals that reach the launcher, kept for the watching loop; old handlers come back at the end."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.getsignal(number) for number in _FORWARDED}
        return self

    def catch(self) -> None:
        """Collect from now on; until then torch elastic's own handlers raise."""
        for number in self._old:
            signal.signal(number, self._note)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            if handler is not None:  # None: set by another language than Python
                signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received.append(number)


@dataclass(slots=True)
class _Memory:
    """The use of host memory in the last seconds, for the report about a killed rank."""

    kills_before: int = field(default_factory=oom_kill_count)
    samples: deque[tuple[float, int, int]] = field(default_factory=lambda: deque(maxlen=10))

    def sample(self) -> None:
        now = time.monotonic()
        if not self.samples or now - self.samples[-1][0] >= 1.0:
            available, total = host_memory()
            self.samples.append((now, total - available, total))

    def hint(self) -> str:
        used, total = max((s[1:] for s in self.samples), default=(0, 1))
        use = f"host memory use reached {used / 2**30:.1f} of {total / 2**30:.1f} GiB"
        if oom_kill_count() > self.kills_before:
            return f"out of host memory: the kernel killed for it meanwhile; {use}"
        return f"from outside; out of host memory? {use}"


@dataclass(slots=True)
class _Ranks:
    """The processes and when each was last seen alive."""

    processes: dict[int, Popen[bytes]]
    streams: RankLogs
    seen: dict[int, float]

    def running(self) -> list[int]:
        return [rank for rank, process in self.processes.items() if process.returncode is None]

    def failed(self) -> list[int]:
        return [rank for rank, process in self.processes.items() if process.returncode]

    def poll(self) -> None:
        now = time.time()
        for rank in self.running():
            if self.processes[rank].poll() is None:
                self.seen[rank] = now

    def end(self, rank: int) -> RankExit:
        process = self.processes[rank]
        account = read_failure_record(self.streams.error_file(rank)) if process.returncode else None
        return RankExit(
            rank=rank,
            pid=process.pid,
            code=process.returncode if process.returncode is not None else -int(signal.SIGKILL),
            time=self.seen[rank],
            account=account,
            log=self.streams.log(rank),
            where=read_fatal_location(self.streams.fault_file(rank)),
        )


def _nothing() -> RemoteRequest:
    return ""


def supervise(
    context: PContext,
    streams: RankLogs,
    signals: Signals,
    times: Timeouts,
    remote_request: Callable[[], RemoteRequest] = _nothing,
) -> AttemptOutcome:
    """Wait until all ranks have ended, ending the others once one has failed or a signal has come.

    Args:
        context: The processes.
        streams: Where their output goes.
        signals: That came to the launcher.
        times: How long to wait for what.
        remote_request: What happened on other machines: "end" ends the ranks, "save" lets them save their state first.
    """
    assert isinstance(context, SubprocessContext)
    processes = {rank: handler.proc for rank, handler in context.subprocess_handlers.items()}
    ranks = _Ranks(processes, streams, dict.fromkeys(processes, time.time()))
    memory = _Memory()

    def wait_for(done: Callable[[], bool], seconds: float = float("inf")) -> bool:
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() >= deadline:
                return False
            memory.sample()
            time.sleep(times.interval)
            ranks.poll()
        return True

    wait_for(lambda: bool(signals.received or ranks.failed() or not ranks.running() or remote_request()))
    if not signals.received and ranks.failed():
        wait_for(lambda: bool(signals.received or _has_cause(ranks)), _SETTLE)
    hint = memory.hint()
    stopped_at = time.time()
    stopped = ranks.running()
    asked = signals.received[0] if signals.received else None
    if asked is None and not ranks.failed() and remote_request() == "save":
        asked = signal.SIGTERM
    patience = times.patience
    if stopped:
        before = len(signals.received)
        if asked in _POLITE:
            # Ranks that listen save their state first; the others end at once.
            _signal_ranks(ranks, asked)
            patience = max(patience, times.grace)
        elif not (asked is None and ranks.failed() and _make_room(ranks)):
            _signal_all(ranks, asked or signal.SIGTERM)
        wait_for(lambda: not ranks.running() or len(signals.received) > before, patience)
    context.close(death_sig=signal.SIGKILL, timeout=_KILL_PATIENCE)
    ranks.poll()
    if signals.received or stopped or ranks.failed():
        _kill_sessions({process.pid for process in processes.values()})
    if signals.received and not _saved_where_memory_ends(ranks):
        return AttemptOutcome(signal=signals.received[0])
    ends = [_judge(ranks.end(rank), rank in stopped, stopped_at, hint) for rank in processes]
    return AttemptOutcome(ends=tuple(ends))


def _make_room(ranks: _Ranks) -> bool:
    """Whether all that have ended have made room, so that the others are about to as well."""
    return all(ranks.processes[rank].returncode == PREEMPTED for rank in ranks.failed())


def _saved_where_memory_ends(ranks: _Ranks) -> bool:
    return all(process.returncode == PREEMPTED for process in ranks.processes.values())


def _has_cause(ranks: _Ranks) -> bool:
    """Whether a failure is known that no other rank's end explains, or none can come any more."""
    if not ranks.running():
        return True
    ends = [ranks.end(rank) for rank in ranks.failed()]
    # gloo ends the process when ranks bring different sizes: only the others can tell in which exchange.
    aborted = any(end.code == -signal.SIGABRT for end in ends)
    return not aborted and any(not end.is_secondary for end in ends)


def _judge(end: RankExit, stopped: bool, stopped_at: float, hint: str) -> RankExit:
    """Tell a rank that the launcher ended from one that failed by itself while it was being ended."""
    if stopped and (end.account is None or end.account.time >= stopped_at):
        return replace(end, stopped=True)
    return replace(end, hint=hint) if end.code == -signal.SIGKILL else end


def _signal_ranks(ranks: _Ranks, number: int) -> None:
    """Signal each running rank, and not what it has started: its workers must live until it has saved."""
    for rank in ranks.running():
        with contextlib.suppress(ProcessLookupError):
            os.kill(ranks.processes[rank].pid, number)


def _signal_all(ranks: _Ranks, number: int) -> None:
    """Signal each running rank and what it has started: elastic gives every rank a session of its own."""
    for rank in ranks.running():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(ranks.processes[rank].pid, number)


def _kill_sessions(sessions: set[int]) -> None:
    """Kill what ended ranks have left behind, such as processes that load data."""
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(pid) in sessions:
                os.kill(pid, signal.SIGKILL)
