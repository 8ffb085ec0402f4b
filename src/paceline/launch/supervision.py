"""Supervision of running ranks: who failed first, when to stop the others, and that no process is left behind."""

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
_CAUSE_TIMEOUT = 3.0
# Signals after which a run may save its state before it ends.
_PREEMPTION_SIGNALS = frozenset({signal.SIGTERM, signal.SIGUSR1})
_KILL_TIMEOUT = 3
# The share of memory in use from which on a killed rank may have run out of it: the last seconds are not seen.
_LIKELY_SHORT = 0.8

RemoteRequest = Literal["", "end", "save"]


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Limits of supervision, in seconds.

    Attributes:
        shutdown: From the signal that ends the ranks to killing them.
        grace: The same after a signal on which ranks may save their state first.
        interval: Between two polls.
    """

    shutdown: float
    grace: float
    interval: float


@dataclass(frozen=True, slots=True)
class AttemptOutcome:
    """How one attempt ended on this machine: with a signal to the launcher, or with the exit of each rank."""

    ends: tuple[RankExit, ...] = ()
    signal: int | None = None

    @property
    def failed(self) -> bool:
        """Whether a rank failed."""
        return any(end.code != 0 for end in self.ends)

    @property
    def preempted(self) -> bool:
        """Whether every rank saved its state and exited on request."""
        return bool(self.ends) and all(end.code == PREEMPTED for end in self.ends)


class Signals:
    """Signals that reach the launcher, collected for the supervising loop; the old handlers are restored on exit."""

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
            signal.signal(number, self._receive)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            if handler is not None:  # None: installed from C, not from Python
                signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received.append(number)


@dataclass(slots=True)
class _HostMemoryLog:
    """Host memory in use over the last seconds, for the report about a killed rank."""

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
            return f"out of host memory: the kernel's OOM killer ran during this time; {use}"
        if used < _LIKELY_SHORT * total:
            return f"from outside; memory is unlikely to be the reason, as {use}"
        return f"from outside; out of host memory? {use}"


@dataclass(slots=True)
class _Ranks:
    """The processes and when each was last seen alive."""

    processes: dict[int, Popen[bytes]]
    logs: RankLogs
    seen: dict[int, float]

    def running(self) -> list[int]:
        return [rank for rank, process in self.processes.items() if process.returncode is None]

    def failed(self) -> list[int]:
        return [rank for rank, process in self.processes.items() if process.returncode]

    def all_preempted(self) -> bool:
        return all(process.returncode == PREEMPTED for process in self.processes.values())

    def poll(self) -> None:
        now = time.time()
        for rank in self.running():
            if self.processes[rank].poll() is None:
                self.seen[rank] = now

    def exit_of(self, rank: int) -> RankExit:
        process = self.processes[rank]
        record = read_failure_record(self.logs.error_file(rank)) if process.returncode else None
        return RankExit(
            rank=rank,
            pid=process.pid,
            code=process.returncode if process.returncode is not None else -int(signal.SIGKILL),
            time=self.seen[rank],
            record=record,
            log=self.logs.log(rank),
            where=read_fatal_location(self.logs.fault_file(rank)),
        )

    def signal_processes(self, number: int) -> None:
        """Signal each running rank, but not its children: data loader workers must live until it has saved."""
        for rank in self.running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.processes[rank].pid, number)

    def signal_groups(self, number: int) -> None:
        """Signal each running rank and its children: elastic starts every rank in a session of its own."""
        for rank in self.running():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.processes[rank].pid, number)


def _no_request() -> RemoteRequest:
    return ""


def supervise(
    context: PContext,
    logs: RankLogs,
    signals: Signals,
    timeouts: Timeouts,
    remote_request: Callable[[], RemoteRequest] = _no_request,
) -> AttemptOutcome:
    """Wait until all ranks have exited; stop the others once one has failed or a signal has come.

    Args:
        context: The processes.
        logs: Where their output and error files are.
        signals: Those that the launcher has received.
        timeouts: How long to wait for what.
        remote_request: What other machines request: "end" ends the ranks, "save" lets them save their state first.

    Returns:
        The exit of each rank, or the signal that ended them.
    """
    assert isinstance(context, SubprocessContext)
    return _Supervisor(context, logs, signals, timeouts, remote_request).run()


class _Supervisor:
    """The steps of `supervise`, in order."""

    def __init__(
        self,
        context: SubprocessContext,
        logs: RankLogs,
        signals: Signals,
        timeouts: Timeouts,
        remote_request: Callable[[], RemoteRequest],
    ) -> None:
        processes = {rank: handler.proc for rank, handler in context.subprocess_handlers.items()}
        self._ranks = _Ranks(processes, logs, dict.fromkeys(processes, time.time()))
        self._context = context
        self._signals = signals
        self._timeouts = timeouts
        self._remote_request = remote_request
        self._memory = _HostMemoryLog()

    def run(self) -> AttemptOutcome:
        self._wait_for_event()
        hint, stopped_at = self._memory.hint(), time.time()
        stopped = self._ranks.running()
        if stopped:
            self._stop_running()
        self._context.close(death_sig=signal.SIGKILL, timeout=_KILL_TIMEOUT)
        self._ranks.poll()
        if self._signals.received or stopped or self._ranks.failed():
            _kill_sessions({process.pid for process in self._ranks.processes.values()})
        if self._signals.received and not self._ranks.all_preempted():
            return AttemptOutcome(signal=self._signals.received[0])
        ends = [_classify(self._ranks.exit_of(r), r in stopped, stopped_at, hint) for r in self._ranks.processes]
        return AttemptOutcome(ends=tuple(ends))

    def _wait_for_event(self) -> None:
        """Wait until a signal or a remote request comes, a rank fails, or all have exited."""
        self._wait_until(self._has_event)
        if not self._signals.received and self._ranks.failed():
            self._wait_until(lambda: bool(self._signals.received or self._is_cause_known()), _CAUSE_TIMEOUT)

    def _has_event(self) -> bool:
        if self._signals.received or self._ranks.failed() or not self._ranks.running():
            return True
        return bool(self._remote_request())

    def _is_cause_known(self) -> bool:
        """Whether some failure is not explained by another rank's, or no rank is left that could explain it."""
        if not self._ranks.running():
            return True
        ends = [self._ranks.exit_of(rank) for rank in self._ranks.failed()]
        # gloo aborts the process when ranks pass different sizes: only the others can tell in which collective.
        aborted = any(end.code == -signal.SIGABRT for end in ends)
        return not aborted and any(not end.is_secondary for end in ends)

    def _stop_running(self) -> None:
        """Signal the running ranks, and wait until they have exited, another signal comes, or time is up."""
        num_signals = len(self._signals.received)
        number = self._stop_signal()
        timeout = self._timeouts.shutdown
        if number in _PREEMPTION_SIGNALS:
            # Ranks that handle it save their state first; the others exit at once.
            self._ranks.signal_processes(number)
            timeout = max(timeout, self._timeouts.grace)
        elif number is not None:
            self._ranks.signal_groups(number)
        elif not self._is_preemption_under_way():
            self._ranks.signal_groups(signal.SIGTERM)
        self._wait_until(lambda: not self._ranks.running() or len(self._signals.received) > num_signals, timeout)

    def _stop_signal(self) -> int | None:
        """The signal to forward to the ranks; None when a failure or another machine ends them."""
        if self._signals.received:
            return self._signals.received[0]
        if not self._ranks.failed() and self._remote_request() == "save":
            return signal.SIGTERM
        return None

    def _is_preemption_under_way(self) -> bool:
        """Whether all ranks that have exited saved their state, so that the others are about to do so as well."""
        failed = self._ranks.failed()
        return bool(failed) and all(self._ranks.processes[rank].returncode == PREEMPTED for rank in failed)

    def _wait_until(self, is_done: Callable[[], bool], seconds: float = float("inf")) -> None:
        deadline = time.monotonic() + seconds
        while not is_done() and time.monotonic() < deadline:
            self._memory.sample()
            time.sleep(self._timeouts.interval)
            self._ranks.poll()


def _classify(end: RankExit, stopped: bool, stopped_at: float, hint: str) -> RankExit:
    """Mark a rank that the launcher stopped, as opposed to one that failed by itself while being stopped."""
    if stopped and (end.record is None or end.record.time >= stopped_at):
        return replace(end, stopped=True)
    return replace(end, hint=hint) if end.code == -signal.SIGKILL else end


def _kill_sessions(sessions: set[int]) -> None:
    """Kill what exited ranks have left behind, such as data loader workers."""
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(pid) in sessions:
                os.kill(pid, signal.SIGKILL)
