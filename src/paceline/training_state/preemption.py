"""A signal that asks a run to make room: one rank gets it, all agree where to stop, and stop there.

Nothing is exchanged while no signal comes. A rank that gets one leaves a note for the others; each then says how far
it may go before it knows more, and the farthest of these points is where all stop. The points are batches handed out
by prepared loaders, which all ranks count alike.
"""

from __future__ import annotations

import atexit
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

from paceline.environment.logging import get_logger
from paceline.errors import PREEMPTED, CollectiveError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import FrameType

    from paceline.collectives import Group

__all__ = ["Preempted", "Preemption"]

_LOG = get_logger(__name__)
_POLL = 0.25
_PATIENCE = 60.0


class Preempted(SystemExit):
    """Ends a run that was asked to make room, after its state was saved."""

    def __init__(self) -> None:
        super().__init__(PREEMPTED)


class Preemption:
    """Watches for signals on all ranks and finds a point at which all of them can act.

    The first signal is noted; a second one does what it did before.

    Args:
        group: All ranks.
        signals: Names, such as `SIGTERM`.
        act: Called on all ranks at the point that was agreed on.
    """

    def __init__(self, group: Group, signals: Iterable[str], act: Callable[[], None]) -> None:
        self.act = act
        self._group = group
        self._received: str | None = None
        self._points = 0
        self._limit: int | None = None
        self._agreed = threading.Event()
        self._lock = threading.Lock()
        self._old: dict[int, Any] = {}
        self._closed = threading.Event()
        self._board = group.open_board(group.broadcast_object(f"preemption/{time.time_ns()}"))
        if threading.current_thread() is threading.main_thread():
            for name in signals:
                number = signal.Signals[name]
                self._old[number] = signal.signal(number, self._note)
        self._watcher = threading.Thread(target=self._watch, name="paceline-preemption", daemon=True)
        self._watcher.start()
        # A thread that is in the store's C++ when the interpreter ends takes the process down with SIGABRT.
        atexit.register(self.close)

    def _note(self, number: int, _: FrameType | None) -> None:
        # Nothing else is safe inside a handler; the watcher tells the others.
        self._received = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._old.clear()

    def close(self) -> None:
        """Stop watching; signals do again what they did before."""
        self._closed.set()
        atexit.unregister(self.close)
        if threading.current_thread() is not self._watcher:
            self._watcher.join(_PATIENCE)
        if threading.current_thread() is threading.main_thread():
            self._restore()

    def reach_point(self) -> None:
        """Pass a point at which the run could be stopped, or act there if it is the one agreed on."""
        with self._lock:
            self._points += 1
            limit = self._limit
        if limit is not None and self._points >= limit:
            self._stop_or_pass()

    def _stop_or_pass(self) -> None:
        if not self._agreed.wait(_PATIENCE):
            raise CollectiveError(
                f"Rank {self._group.rank} was asked to stop and did not hear where within {_PATIENCE:.0f} s",
                "Some rank does not run any more",
                "Look for the first error among the other ranks",
            )
        assert self._limit is not None
        if self._points >= self._limit:
            self._limit = None
            self.close()
            self.act()

    # In the watcher's thread

    def _watch(self) -> None:
        while not self._closed.wait(_POLL):
            if self._received is not None:
                self._board.post("asked", f"{self._received} to rank {self._group.rank}")
            asked = self._board.read("asked")
            if asked is not None:
                _LOG.warning("%s: all ranks stop at the next batch and save", asked)
                self._agree()
                return

    def _agree(self) -> None:
        with self._lock:
            self._limit = mine = self._points + 1
        self._board.post(f"limit/{self._group.rank}", str(mine))
        limits: dict[int, int] = {}
        while len(limits) < self._group.size and not self._closed.wait(0.01):
            for rank in range(self._group.size):
                text = self._board.read(f"limit/{rank}") if rank not in limits else None
                if text is not None:
                    limits[rank] = int(text)
        if len(limits) == self._group.size:
            with self._lock:
                self._limit = max(limits.values())
            self._agreed.set()
