"""Preemption: when one rank receives a signal, all ranks agree on a batch, save there and stop.

Nothing is exchanged until a signal arrives. The rank that receives one posts it to the others. Each rank then posts
the earliest batch at which it could stop, and all stop at the latest of them. Batches are those of prepared loaders,
which all ranks count alike.
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
_POLL_SECONDS = 0.25
_TIMEOUT = 60.0


class Preempted(SystemExit):
    """Ends a preempted run, after its state was saved."""

    def __init__(self) -> None:
        super().__init__(PREEMPTED)


class Preemption:
    """Watches for signals on all ranks and finds a batch at which all of them can stop.

    The first signal is recorded; a second one has its original effect.

    Args:
        group: All ranks.
        signals: Names, such as `SIGTERM`.
        act: Called on all ranks at the batch agreed on.
    """

    def __init__(self, group: Group, signals: Iterable[str], act: Callable[[], None]) -> None:
        self.act = act
        self._group = group
        self._received: str | None = None
        self._points = 0
        self._limit: int | None = None
        self._agreed = threading.Event()
        self._lock = threading.Lock()
        self._original_handlers: dict[int, Any] = {}
        self._closed = threading.Event()
        self._board = group.open_board(group.broadcast_object(f"preemption/{time.time_ns()}"))
        if threading.current_thread() is threading.main_thread():
            for name in signals:
                number = signal.Signals[name]
                self._original_handlers[number] = signal.signal(number, self._on_signal)
        self._watcher = threading.Thread(target=self._watch, name="paceline-preemption", daemon=True)
        self._watcher.start()
        # A thread inside the store's C++ code when the interpreter ends aborts the process (SIGABRT).
        atexit.register(self.close)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        # Nothing else is safe inside a signal handler; the watcher notifies the other ranks.
        self._received = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._original_handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._original_handlers.clear()

    def close(self) -> None:
        """Stop watching and restore the signal handlers."""
        self._closed.set()
        atexit.unregister(self.close)
        if threading.current_thread() is not self._watcher:
            self._watcher.join(_TIMEOUT)
        if threading.current_thread() is threading.main_thread():
            self._restore()

    def reach_point(self) -> None:
        """Count one batch; save and stop here if the ranks agreed on it."""
        with self._lock:
            self._points += 1
            limit = self._limit
        if limit is not None and self._points >= limit:
            self._stop_or_pass()

    def _stop_or_pass(self) -> None:
        if not self._agreed.wait(_TIMEOUT):
            raise CollectiveError(
                f"The ranks did not agree within {_TIMEOUT:.0f} s where to stop (rank {self._group.rank})",
                "Some rank is no longer running",
                "Look for the first error among the other ranks",
            )
        assert self._limit is not None
        if self._points >= self._limit:
            self._limit = None
            self.close()
            self.act()

    # In the watcher thread

    def _watch(self) -> None:
        while not self._closed.wait(_POLL_SECONDS):
            if self._received is not None:
                self._board.post("signal", f"{self._received} to rank {self._group.rank}")
            received = self._board.read("signal")
            if received is not None:
                _LOG.warning("%s: all ranks stop at the next batch and save", received)
                self._agree()
                return

    def _agree(self) -> None:
        with self._lock:
            self._limit = earliest = self._points + 1
        self._board.post(f"limit/{self._group.rank}", str(earliest))
        limits: dict[int, int] = {}
        while len(limits) < self._group.size and not self._closed.wait(0.01):
            for rank in range(self._group.size):
                text = None
                if rank not in limits:
                    text = self._board.read(f"limit/{rank}")
                if text is not None:
                    limits[rank] = int(text)
        if len(limits) == self._group.size:
            with self._lock:
                self._limit = max(limits.values())
            self._agreed.set()
