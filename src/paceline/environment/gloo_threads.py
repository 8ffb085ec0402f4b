"""Waiting, at the end of a program, until gloo's threads have released the last tensors.

gloo runs collectives in threads of its own (`pt_gloo_runloop`). Such a thread wakes the caller first and releases the
tensors afterwards, for which it acquires the GIL. If the interpreter is being finalized by then, Python ends the thread
with `pthread_exit`, the unwinding reaches a noexcept destructor, and the process aborts with "terminate called without
an active exception", after all its work was done. Closing the group does not help as long as a DDP model or a mesh
references it: only dropping the last reference joins the threads.
"""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ["wait_for_gloo_threads"]

_TASKS = Path("/proc/self/task")
_NAME = "pt_gloo_runloop"  # 15 characters, as many as Linux keeps
_SHORTEST_PAUSE = 0.0005
_LONGEST_PAUSE = 0.02
# Seconds to wait where the states of threads cannot be read.
_BLIND_WAIT = 0.1
# The number of the system call futex.
_FUTEX = {"x86_64": "202", "aarch64": "98"}.get(platform.machine())


@dataclass(frozen=True)
class _Thread:
    """The state of a gloo thread at one moment.

    Attributes:
        task: Its thread ID.
        sleeps: Whether it waits for something; otherwise it is running or runnable.
        awaits_work: Whether it waits without a limit: waits for a peer, or for the GIL, have one.
        switches: Its number of voluntary context switches.
    """

    task: str
    sleeps: bool
    awaits_work: bool
    switches: str


def wait_for_gloo_threads(limit: float, *, for_peers: bool) -> bool:
    """Wait until no gloo thread is busy.

    Args:
        limit: Maximum number of seconds.
        for_peers: Whether to wait also for collectives that need other ranks and that the program did not wait for.

    Returns:
        False when a thread was still busy after `limit` seconds.
    """
    if not _TASKS.is_dir():
        time.sleep(_BLIND_WAIT)
        return True
    deadline = time.monotonic() + limit
    pause = _SHORTEST_PAUSE
    before, now = None, _threads()
    # One reading is not enough: a thread that waits for the GIL sleeps, too.
    while now and not (now == before and all(t.sleeps and (t.awaits_work or not for_peers) for t in now)):
        if time.monotonic() > deadline:
            return False
        # Sleeping releases the GIL.
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
        before, now = now, _threads()
    return True


def _threads() -> list[_Thread]:
    threads = (_maybe_thread(task) for task in sorted(_TASKS.iterdir()))
    return [thread for thread in threads if thread is not None]


def _maybe_thread(task: Path) -> _Thread | None:
    """Return the state of a thread; None if it is not gloo's or has ended."""
    try:
        if (task / "comm").read_text().strip() != _NAME:
            return None
        status = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
        sleeps = status["State"].split()[0] == "S"
        return _Thread(task.name, sleeps, sleeps and _awaits_work(task), status["voluntary_ctxt_switches"].strip())
    except OSError:
        return None


def _awaits_work(task: Path) -> bool:
    """Whether a sleeping thread waits for a futex without a limit; True where that cannot be read."""
    try:
        call = (task / "syscall").read_text().split()
    except OSError:
        return True
    # The system call's number, address, operation, value, timeout ...; the single word "running" outside of one.
    return _FUTEX is None or (call[0] == _FUTEX and int(call[4], 16) == 0)
