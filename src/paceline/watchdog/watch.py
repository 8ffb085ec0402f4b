"""The thread that notices a standstill, and how the ranks then agree on one account of it.

Every rank has such a thread with a connection of its own to the store in which the ranks have met. One that sees its
process wait too long opens an inquiry there; each answers with where its rank is; the one that asked composes the
verdict, leaves it for all, and all end with exit code 76. A rank whose collective raised asks too before it ends.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING

import torch.distributed as dist

from paceline.environment.error_file import ErrorFile, stacks_folder
from paceline.environment.logging import get_logger
from paceline.errors import HUNG
from paceline.watchdog.diagnosis import RankStatus, diagnose
from paceline.watchdog.locations import all_stacks, here, location_in_traceback, main_stack
from paceline.watchdog.recorder import GroupStatus, current_status, flight_record, is_device_busy, recent_operations

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from paceline.environment.world import World

__all__ = ["Watch", "default_limit", "start_watch"]

_LOG = get_logger(__name__)
_NAME = "paceline-watchdog"
_PREFIX = "paceline/watch"
# Of the time that a collective may take: the verdict must come before torch ends the ranks.
_SHARE = 0.9
# Seconds between two looks, at most; and after how many of waiting it is remarked on.
_INTERVAL = 2.0
_REMARK = 120.0
# For the other ranks to answer, beyond the time in which they look: a machine may be busy.
_ANSWERS = 10.0
# Between two looks at the end of the program.
_PAUSE = 0.5


def default_limit() -> float:
    """Somewhat less than the shortest time that a collective may take, in seconds."""
    group = dist.group.WORLD
    assert group is not None
    backends = {id(b): b for b in map(group._get_backend, group._device_types)}.values()
    seconds = [t.total_seconds() for b in backends if (t := getattr(b.options, "_timeout", None)) is not None]
    return _SHARE * min(seconds, default=1800.0)


def start_watch(world: World, error_file: ErrorFile, limit: float | None) -> Watch | None:
    """Watch this process for as long as its process group is open; None where one does already, or it makes no sense.

    Args:
        world: This rank's place.
        error_file: Where the verdict goes.
        limit: Seconds that a collective may stand still; None takes the default, 0 watches nothing.
    """
    seconds = default_limit() if limit is None else limit
    running = any(thread.name == _NAME and thread.is_alive() for thread in threading.enumerate())
    if world.size == 1 or seconds <= 0 or running:
        return None
    store = dist.distributed_c10d._get_default_store()
    if not hasattr(store, "clone"):
        return None
    return Watch(store.clone(), world, error_file, seconds)


class Watch:
    """Watches one rank.

    Args:
        store: A connection that no other thread uses.
        world: This rank's place.
        error_file: Where the verdict goes.
        limit: Seconds that a collective may stand still.
    """

    def __init__(self, store: Store, world: World, error_file: ErrorFile, limit: float) -> None:
        self.limit = limit
        self._store = store
        self._world = world
        self._error_file = error_file
        self._interval = min(_INTERVAL, limit / 10)
        # A short limit makes its own remark.
        self._remark_after = _REMARK if limit > 2 * _REMARK else limit
        self._closed = threading.Event()
        self._is_at_end = False
        self._progress = _Progress(min(limit / 2, _REMARK / 2))
        self._inquiries = 0
        self._group = id(dist.group.WORLD)
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._watch, name=_NAME, daemon=True)
        self._thread.start()
        # A thread that is in the store's C++ when the interpreter ends takes the process down with SIGABRT.
        atexit.register(self.close)

    def close(self) -> None:
        """Stop watching, and leave word for the others of how this rank ends."""
        atexit.unregister(self.close)
        if os.getpid() != self._pid or self._closed.is_set():
            return
        error = getattr(sys, "last_value", None)
        if error is None:
            self._let_finish()
        self._closed.set()
        self._thread.join(10 * self._interval)
        with contextlib.suppress(RuntimeError):
            if error is not None and _is_of_an_exchange(error):
                self._explain(error)
            else:
                fate = "has ended" if error is None else f"failed ({type(error).__name__})"
                self._set(f"fate/{self._world.rank}", RankStatus(rank=self._world.rank, fate=fate))

    def _let_finish(self) -> None:
        """Wait, still watched, for what a device has not ended yet: closing the group would wait for it unwatched."""
        deadline = time.monotonic() + self.limit + 5 * self._interval
        while is_device_busy() and time.monotonic() < deadline:
            self._is_at_end = True
            self._closed.wait(_PAUSE)

    # In the thread

    def _watch(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store has gone: so has who started us
            while not self._closed.wait(self._interval) and self._is_open():
                waited = self._progress.look()
                if waited > self.limit:
                    self._ask("hang", waited)
                elif waited > self._remark_after and self._progress.remark_once():
                    self._ask("remark", waited)
                self._attend()

    def _is_open(self) -> bool:
        return dist.is_initialized() and id(dist.group.WORLD) == self._group

    def _attend(self) -> None:
        """Answer what has been asked, by this rank or another."""
        text = self._get(f"asked/{self._inquiries}")
        if text is None:
            return
        number, asked = self._inquiries, json.loads(text)
        self._inquiries += 1
        if asked["why"] == "hang":
            self._write_stacks()
        self._set(f"answer/{number}/{self._world.rank}", self._standing())
        mine = asked["by"] == self._world.rank
        if asked["why"] == "remark" and mine:
            found = self._hear(number, asked["seconds"])
            rest = self.limit - asked["seconds"]
            _LOG.warning("%s\nThe run ends if this lasts %.0f s more.", found, rest, main_process_only=False)
        if asked["why"] == "hang":
            self._end(number, asked["seconds"], mine)

    def _ask(self, why: str, seconds: float) -> int:
        """Open an inquiry, unless another rank has just done so."""
        asked = json.dumps({"why": why, "by": self._world.rank, "seconds": seconds})
        self._store.compare_set(f"{_PREFIX}/asked/{self._inquiries}", "", asked)
        return self._inquiries

    def _hear(self, number: int, seconds: float) -> str:
        """Wait a moment for all answers and say what they amount to."""
        standings: dict[int, RankStatus] = {}
        deadline = time.monotonic() + 2 * self._interval + _ANSWERS
        while len(standings) < self._world.size and time.monotonic() < deadline:
            for rank in range(self._world.size):
                for key in (f"answer/{number}/{rank}", f"fate/{rank}"):
                    text = self._get(key) if rank not in standings else None
                    if text is not None:
                        standings[rank] = RankStatus.from_data(json.loads(text))
            time.sleep(0.05)
        return diagnose(standings.values(), self._world.size, seconds=seconds)

    def _end(self, number: int, seconds: float, mine: bool) -> None:
        """End this process with the verdict of the rank that asked."""
        text: str | None
        if mine:
            found = self._hear(number, seconds)
            folder = stacks_folder(self._world.run_id, self._world.restart_count)
            text = f"{found}\nThe stacks of all threads of each rank are in {folder} on its machine"
            self._store.set(f"{_PREFIX}/verdict/{number}", text)
        else:
            deadline = time.monotonic() + 2 * self._interval + 2 * _ANSWERS
            while (text := self._get(f"verdict/{number}")) is None and time.monotonic() < deadline:
                time.sleep(0.05)
        text = text or "ranks wait for each other; the one that was to say where did not"
        headline = text.partition("\n")[0]
        self._error_file.write("hang", headline, text, rank=self._world.rank, code=HUNG, secondary=not mine)
        self._leave_together(number)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(HUNG)

    def _leave_together(self, number: int) -> None:
        """Rank 0 may hold the store in which the others still read."""
        with contextlib.suppress(RuntimeError):
            seen = self._store.add(f"{_PREFIX}/seen/{number}", 1)
            deadline = time.monotonic() + self._interval + 1
            while self._world.rank == 0 and seen < self._world.size and time.monotonic() < deadline:
                time.sleep(0.05)
                seen = self._store.add(f"{_PREFIX}/seen/{number}", 0)

    # At the end of a rank whose collective raised

    def _explain(self, error: BaseException) -> None:
        """Ask where the others are, and add that to the account of the failure."""
        standing = self._standing(error)
        # The launcher may end this process before the others have answered.
        self._error_file.add_remark(str(standing))
        self._set(f"fate/{self._world.rank}", standing)
        while (text := self._get(f"asked/{self._inquiries}")) is not None and '"failure"' not in text:
            self._inquiries += 1
        found = self._hear(self._ask("failure", 0.0), 0.0)
        self._error_file.add_remark(found)
        self._error_file.print_unless_reported(found)

    # What is said

    def _standing(self, error: BaseException | None = None) -> RankStatus:
        place = None if self._is_at_end else here() if error is None else location_in_traceback(error.__traceback__)
        fate = "" if error is None else f"failed ({type(error).__name__})"
        return RankStatus(
            rank=self._world.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            place=place,
            operations=tuple(recent_operations()),
            fate="is at the end of its program" if self._is_at_end else fate,
            raised=error is not None,
        )

    def _write_stacks(self) -> None:
        folder = stacks_folder(self._world.run_id, self._world.restart_count)
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"rank_{self._world.rank}.txt").write_text(all_stacks(), encoding="utf-8")
            (folder / f"rank_{self._world.rank}.flight").write_bytes(flight_record())

    def _get(self, key: str) -> str | None:
        full = f"{_PREFIX}/{key}"
        return self._store.get(full).decode() if self._store.check([full]) else None

    def _set(self, key: str, standing: RankStatus) -> None:
        self._store.set(f"{_PREFIX}/{key}", json.dumps(standing.to_data()))


class _Progress:
    """How long this process has been in a collective that does not end, its main thread in one place."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._status: GroupStatus = {}
        self._stack: tuple[tuple[int, int], ...] = ()
        self._since = time.monotonic()
        self._waits: bool | None = None
        self._remarked = False

    def look(self) -> float:
        """Seconds of waiting; 0 while it does not wait, or not for long."""
        status, now = current_status(), time.monotonic()
        if all(entered == completed for entered, completed in status.values()):
            return 0.0
        # What is replayed from a captured graph may never be noted as ended: whoever goes on does not wait.
        stack = main_stack()
        if (status, stack) != (self._status, self._stack):
            self._status, self._stack, self._since, self._waits, self._remarked = status, stack, now, None, False
        waited = now - self._since
        if waited < self._patience:
            return 0.0
        if self._waits is None:
            # The short status may show the last ones in the wrong order; only the record itself is sure.
            self._waits = any(not operation.done for operation in recent_operations())
        return waited if self._waits else 0.0

    def remark_once(self) -> bool:
        """Whether this wait has not been remarked on yet."""
        first, self._remarked = not self._remarked, True
        return first


def _is_of_an_exchange(error: BaseException | None) -> bool:
    """Whether an exception came out of an exchange between ranks."""
    while error is not None:
        if isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
