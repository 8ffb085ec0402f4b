"""Heartbeats between launchers, and requests of other machines, read by one background thread.

A store behind a broken connection does not respond, and a call to it cannot be cancelled. So the supervising thread
never makes one: it uses what this thread read last, and how long ago that was.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING

from paceline.errors import first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch._C._distributed_c10d import Store

    from paceline.config.schema.rendezvous import RendezvousOptions
    from paceline.launch.supervision import RemoteRequest

__all__ = ["Heartbeat"]

_POLL = 0.3


class Heartbeat:
    """Sends this launcher's heartbeat and listens for those of the others."""

    def __init__(self, store: Store, token: str, options: RendezvousOptions) -> None:
        self._store = store
        self._token = token
        self._options = options
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="paceline-heartbeat", daemon=True)
        self._contact = time.monotonic()
        self._broken = ""
        self._beats = 0
        self._heard: dict[str, tuple[bytes, float]] = {}
        self._peers: tuple[str, ...] = ()
        self._stop = ""
        self._stopped = False
        self._waiting: Callable[[], int] | None = None
        self._joiners = False
        self._thread.start()

    def watch(self, peers: Iterable[str], stop: str, waiting: Callable[[], int] | None) -> None:
        """Watch the machines of one attempt.

        Args:
            peers: Tokens of the other launchers of the attempt.
            stop: The key that one of them sets when its ranks have failed.
            waiting: Returns how many machines wait to join; None when none can.
        """
        now = time.monotonic()
        self._heard = dict.fromkeys(peers, (b"", now))
        self._peers = tuple(self._heard)
        self._stopped = self._joiners = False
        self._stop, self._waiting = stop, waiting

    def pause(self) -> None:
        """Watch no attempt, and keep sending heartbeats."""
        self._stop, self._peers, self._waiting = "", (), None

    def close(self) -> None:
        """Stop; a thread that hangs in a call to a dead store is left behind."""
        self._end.set()
        self._thread.join(timeout=2.0)

    @property
    def cut_off(self) -> str:
        """Why the store of machine 0 cannot be reached; empty while it can."""
        if self._broken:
            return self._broken
        silent = time.monotonic() - self._contact
        return f"no response for {silent:.0f} s" if silent > self._options.lost_after else ""

    @property
    def lost(self) -> dict[str, str]:
        """Tokens of launchers without a heartbeat for too long, each with the reason in words."""
        now = time.monotonic()
        late = {token: now - heard for token, (_, heard) in list(self._heard.items()) if token in self._peers}
        return {
            token: f"no heartbeat for {silent:.0f} s"
            for token, silent in late.items()
            if silent > self._options.lost_after
        }

    @property
    def regroup(self) -> bool:
        """Whether another machine wants to join."""
        return self._joiners

    def remote_request(self) -> RemoteRequest:
        """What other machines request from the ranks of this one."""
        if self._stopped or self.cut_off or self.lost:
            return "end"
        return "save" if self._joiners else ""

    def _run(self) -> None:
        next_beat = 0.0
        while not self._end.wait(_POLL):
            try:
                beat = time.monotonic() >= next_beat
                if beat:
                    next_beat = time.monotonic() + self._options.keep_alive_interval
                self._sync(beat)
            except Exception as error:
                # DistError or an error of the rendezvous: both mean that the store is gone.
                with contextlib.suppress(Exception):
                    self._broken = f"its launcher is gone ({first_line(error, 80)})"
                return
            self._contact = time.monotonic()

    def _sync(self, beat: bool) -> None:
        if beat:
            self._beats += 1
            self._store.set(f"beat/{self._token}", str(self._beats))
            for token in self._peers:
                self._listen(token)
        stop, waiting = self._stop, self._waiting
        if stop and not self._stopped:
            self._stopped = self._store.check([stop])
        if beat and stop and waiting is not None:
            self._joiners = waiting() > 0

    def _listen(self, token: str) -> None:
        key = f"beat/{token}"
        value = self._store.get(key) if self._store.check([key]) else b""
        if token not in self._heard or self._heard[token][0] != value:
            self._heard[token] = (value, time.monotonic())
