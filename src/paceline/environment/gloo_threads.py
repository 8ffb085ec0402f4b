"""Waiting, at the end of a program, for gloo's threads to let go of the last tensors.

gloo runs collectives in threads of its own (`pt_gloo_runloop`). Such a thread wakes the caller first and lets go of the
tensors afterwards, and for that it takes the interpreter's lock. If the interpreter is being finalized by then, Python
ends the thread with `pthread_exit`, the unwinding meets a destructor that must not throw, and the process aborts with
"terminate called without an active exception", after all its work was done. Closing the group does not help as long as
a model in DDP or a mesh holds it: only the last reference joins the threads.
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
# Where threads cannot be looked at, they get this long.
_MOMENT = 0.1
# The number of the system call futex.
_FUTEX = {"x86_64": "202", "aarch64": "98"}.get(platform.machine())


@dataclass(frozen=True)
class _Thread:
    """What a thread of gloo does at one moment.

    Attributes:
        task: Its number.
        sleeps: Whether it waits for something; else it runs, or would if a processor were free.
        awaits_work: Whether it waits for any time; what waits for a peer, or for Python's lock, has a limit.
        switches: How often it has begun to wait.
    """

    task: str
    sleeps: bool
    awaits_work: bool
    switches: str


def wait_for_gloo_threads(limit: float, *, for_peers: bool) -> bool:
    """Wait until no thread of gloo is at work; False when one still was after `limit` seconds.

    Args:
        limit: Seconds to wait at most.
        for_peers: Wait as well for collectives that nobody has waited for and that need other ranks.
    """
    if not _TASKS.is_dir():
        time.sleep(_MOMENT)
        return True
    deadline = time.monotonic() + limit
    pause = _SHORTEST_PAUSE
    before, now = None, _look()
    # One look is not enough: a thread that waits for Python's lock sleeps too.
    while now and not (now == before and all(t.sleeps and (t.awaits_work or not for_peers) for t in now)):
        if time.monotonic() > deadline:
            return False
        # Sleeping hands Python's lock to a thread that waits for it.
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
        before, now = now, _look()
    return True


def _look() -> list[_Thread]:
    found = (_maybe_thread(task) for task in sorted(_TASKS.iterdir()))
    return [thread for thread in found if thread is not None]


def _maybe_thread(task: Path) -> _Thread | None:
    """Return what a thread does; None for one that is not gloo's or has ended."""
    try:
        if (task / "comm").read_text().strip() != _NAME:
            return None
        status = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
        sleeps = status["State"].split()[0] == "S"
        return _Thread(task.name, sleeps, sleeps and _awaits_work(task), status["voluntary_ctxt_switches"].strip())
    except OSError:
        return None


def _awaits_work(task: Path) -> bool:
    """Whether a thread that sleeps waits for a condition, without a limit; True where that is not shown."""
    try:
        call = (task / "syscall").read_text().split()
    except OSError:
        return True
    # The call's number, address, operation, value, limit ...; the one word "running" outside a call.
    return _FUTEX is None or (call[0] == _FUTEX and int(call[4], 16) == 0)
