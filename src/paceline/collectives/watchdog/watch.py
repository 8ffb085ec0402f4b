"""The watchdog thread of each rank: it detects a hang, and the ranks agree on one report.

Every rank has such a thread, with its own connection to the store in which the ranks have met. One that sees its
process wait too long opens an inquiry there; each rank responds with its status; the rank that opened it writes the
diagnosis for all, and all exit with code 76. A rank whose collective raised opens one as well before it exits.
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

from paceline.collectives.watchdog.diagnosis import RankStatus, diagnose
from paceline.collectives.watchdog.locations import all_stacks, here, location_in_traceback, main_stack
from paceline.collectives.watchdog.recorder import (
    GroupStatus,
    current_status,
    flight_record,
    group_being_opened,
    is_device_busy,
    recent_operations,
)
from paceline.environment.error_file import ErrorFile, stacks_folder
from paceline.environment.logging import get_logger
from paceline.errors import HUNG

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from paceline.collectives.watchdog.recorder import Operation
    from paceline.environment.world import World

__all__ = ["Watch", "default_limit", "start_watch"]

_LOG = get_logger(__name__)
_NAME = "paceline-watchdog"
_PREFIX = "paceline/watch"
# Fraction of the timeout of collectives: the diagnosis must come before torch aborts the ranks.
_FRACTION = 0.9
# Seconds between two polls, at most; and of waiting before a warning.
_INTERVAL = 2.0
_WARN_AFTER = 120.0
# Seconds for the other ranks to respond, in addition to their polling interval: a machine may be busy.
_RESPONSE_TIMEOUT = 10.0
# Seconds of opening a group after which a rank that has ended is taken for the reason: torch would wait on.
_ENDED_AFTER = 3.0
# Seconds between two polls at the end of the program, and while waiting for responses.
_EXIT_POLL = 0.5
_STORE_POLL = 0.05


def default_limit() -> float:
    """Return somewhat less than the shortest timeout of the group's collectives, in seconds."""
    group = dist.group.WORLD
    assert group is not None
    backends = {id(b): b for b in map(group._get_backend, group._device_types)}.values()
    timeouts = [getattr(backend.options, "_timeout", None) for backend in backends]
    seconds = [timeout.total_seconds() for timeout in timeouts if timeout is not None]
    return _FRACTION * min(seconds, default=1800.0)


def start_watch(world: World, error_file: ErrorFile, limit: float | None) -> Watch | None:
    """Start watching this process for as long as its process group is open.

    Args:
        world: This rank and its machine.
        error_file: Where to write the diagnosis.
        limit: Seconds after which a pending collective is a hang; None takes `default_limit`, 0 disables the watchdog.

    Returns:
        The watchdog; None when there is one already, or nothing to watch.
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
    """The watchdog of one rank.

    Args:
        store: A connection that no other thread uses.
        world: This rank and its machine.
        error_file: Where to write the diagnosis.
        limit: Seconds after which a pending collective is a hang.
    """

    def __init__(self, store: Store, world: World, error_file: ErrorFile, limit: float) -> None:
        self.limit = limit
        self._store = store
        self._world = world
        self._error_file = error_file
        self._interval = min(_INTERVAL, limit / 10)
        # With a short limit the diagnosis itself comes soon enough.
        self._warn_after = _WARN_AFTER if limit > 2 * _WARN_AFTER else limit
        self._closed = threading.Event()
        self._is_at_end = False
        self._timer = _CollectiveTimer(min(limit / 2, _WARN_AFTER / 2))
        self._num_inquiries = 0
        self._group = id(dist.group.WORLD)
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._watch, name=_NAME, daemon=True)
        self._thread.start()
        # A thread that is in the store's C++ code during finalization aborts the process with SIGABRT.
        atexit.register(self.close)

    def close(self) -> None:
        """Stop watching, and tell the other ranks how this one ends."""
        atexit.unregister(self.close)
        if os.getpid() != self._pid or self._closed.is_set():
            return
        error = getattr(sys, "last_value", None)
        if error is None:
            self._wait_for_device()
        self._closed.set()
        self._thread.join(10 * self._interval)
        with contextlib.suppress(RuntimeError):
            self._store.add(f"{_PREFIX}/ended", 1)
            if error is not None and _came_from_collective(error):
                self._explain(error)
            else:
                fate = "has ended"
                if error is not None:
                    fate = f"failed ({type(error).__name__})"
                self._set(f"fate/{self._world.rank}", RankStatus(rank=self._world.rank, fate=fate))

    def _wait_for_device(self) -> None:
        """Wait, still watched, for pending NCCL collectives: closing the group would wait for them unwatched."""
        deadline = time.monotonic() + self.limit + 5 * self._interval
        while is_device_busy() and time.monotonic() < deadline:
            self._is_at_end = True
            self._closed.wait(_EXIT_POLL)

    # In the thread

    def _watch(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone, and the launcher with it
            while not self._closed.wait(self._interval) and self._is_open():
                waited = self._timer.seconds_waited()
                opening = self._timer.seconds_opening()
                if opening > _ENDED_AFTER and self._has_any_ended():
                    self._open_inquiry("hang", opening)
                elif waited > self.limit:
                    self._open_inquiry("hang", waited)
                elif waited > self._warn_after and self._timer.warn_once():
                    self._open_inquiry("warning", waited)
                self._respond()

    def _has_any_ended(self) -> bool:
        return int(self._store.add(f"{_PREFIX}/ended", 0)) > 0

    def _is_open(self) -> bool:
        return dist.is_initialized() and id(dist.group.WORLD) == self._group

    def _respond(self) -> None:
        """Respond to an inquiry of this rank or another."""
        text = self._get(f"asked/{self._num_inquiries}")
        if text is None:
            return
        number, inquiry = self._num_inquiries, json.loads(text)
        self._num_inquiries += 1
        reason, seconds, is_local = inquiry["why"], inquiry["seconds"], inquiry["by"] == self._world.rank
        if reason == "hang":
            self._write_stacks()
        self._set(f"answer/{number}/{self._world.rank}", self._status())
        if reason == "hang":
            self._exit(number, seconds, is_local)
        elif reason == "warning" and is_local:
            text = self._diagnose(number, seconds)
            left = self.limit - seconds
            _LOG.warning("%s\nThe run ends if this lasts %.0f s more.", text, left, main_process_only=False)

    def _open_inquiry(self, reason: str, seconds: float) -> int:
        """Open an inquiry, unless another rank has just done so; return its number."""
        inquiry = json.dumps({"why": reason, "by": self._world.rank, "seconds": seconds})
        self._store.compare_set(f"{_PREFIX}/asked/{self._num_inquiries}", "", inquiry)
        return self._num_inquiries

    def _diagnose(self, number: int, seconds: float) -> str:
        """Wait for all responses to an inquiry, up to a limit, and return the diagnosis."""
        statuses: dict[int, RankStatus] = {}
        deadline = time.monotonic() + 2 * self._interval + _RESPONSE_TIMEOUT
        while len(statuses) < self._world.size and time.monotonic() < deadline:
            for rank in range(self._world.size):
                for key in (f"answer/{number}/{rank}", f"fate/{rank}"):
                    text = None
                    if rank not in statuses:
                        text = self._get(key)
                    if text is not None:
                        statuses[rank] = RankStatus.from_data(json.loads(text))
            time.sleep(_STORE_POLL)
        return diagnose(statuses.values(), self._world.size, seconds=seconds)

    def _exit(self, number: int, seconds: float, is_local: bool) -> None:
        """Exit this process with the diagnosis of the rank that opened the inquiry."""
        if is_local:
            folder = stacks_folder(self._world.run_id, self._world.restart_count)
            diagnosis = self._diagnose(number, seconds)
            text = f"{diagnosis}\nThe stacks of all threads of each rank are in {folder} on its machine"
            self._store.set(f"{_PREFIX}/verdict/{number}", text)
        else:
            text = self._wait_for_diagnosis(number)
        headline = text.partition("\n")[0]
        self._error_file.write("hang", headline, text, rank=self._world.rank, code=HUNG, secondary=not is_local)
        self._wait_for_readers(number)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(HUNG)

    def _wait_for_diagnosis(self, number: int) -> str:
        deadline = time.monotonic() + 2 * self._interval + 2 * _RESPONSE_TIMEOUT
        while time.monotonic() < deadline:
            text = self._get(f"verdict/{number}")
            if text is not None:
                return text
            time.sleep(_STORE_POLL)
        return "ranks wait for each other; the rank that was to report where did not"

    def _wait_for_readers(self, number: int) -> None:
        """On rank 0, wait until all ranks have read the diagnosis: its process may host the store."""
        with contextlib.suppress(RuntimeError):
            num_readers = self._store.add(f"{_PREFIX}/seen/{number}", 1)
            deadline = time.monotonic() + self._interval + 1
            while self._world.rank == 0 and num_readers < self._world.size and time.monotonic() < deadline:
                time.sleep(_STORE_POLL)
                num_readers = self._store.add(f"{_PREFIX}/seen/{number}", 0)

    # At the exit of a rank whose collective raised

    def _explain(self, error: BaseException) -> None:
        """Find out where the other ranks are, and add that to the recorded failure."""
        status = self._status(error)
        # The launcher may stop this process before the others have responded.
        self._error_file.add_remark(str(status))
        self._set(f"fate/{self._world.rank}", status)
        while (text := self._get(f"asked/{self._num_inquiries}")) is not None and '"failure"' not in text:
            self._num_inquiries += 1
        diagnosis = self._diagnose(self._open_inquiry("failure", 0.0), 0.0)
        self._error_file.add_remark(diagnosis)
        self._error_file.print_unless_reported(diagnosis)

    # The status of this rank

    def _status(self, error: BaseException | None = None) -> RankStatus:
        location, fate = here(), ""
        operations = recent_operations()
        opening = group_being_opened()
        if opening is not None:
            operations.append(opening)
        if error is not None:
            location, fate = location_in_traceback(error.__traceback__), f"failed ({type(error).__name__})"
        if self._is_at_end:
            location, fate = None, "is at the end of its program"
        return RankStatus(
            rank=self._world.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            location=location,
            operations=tuple(operations),
            fate=fate,
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
        if self._store.check([full]):
            return self._store.get(full).decode()
        return None

    def _set(self, key: str, status: RankStatus) -> None:
        self._store.set(f"{_PREFIX}/{key}", json.dumps(status.to_data()))


class _CollectiveTimer:
    """How long a collective has been pending in this process while its main thread stayed in one place.

    The opening of a group counts as one.

    Args:
        min_seconds: Shorter waits count as none.
    """

    def __init__(self, min_seconds: float) -> None:
        self._min_seconds = min_seconds
        self._groups: GroupStatus = {}
        self._stack: tuple[tuple[int, int], ...] = ()
        self._opening: Operation | None = None
        self._since = time.monotonic()
        self._is_pending: bool | None = None
        self._has_warned = False

    def seconds_waited(self) -> float:
        """Return the seconds of waiting; 0 while nothing is pending, or not for long."""
        groups, now = current_status(), time.monotonic()
        opening = group_being_opened()
        if opening is None and all(entered == completed for entered, completed in groups.values()):
            self._opening = None
            return 0.0
        # Collectives replayed from a CUDA graph may never be recorded as completed: a main thread that moves is fine.
        stack = main_stack()
        if (groups, stack, opening) != (self._groups, self._stack, self._opening):
            self._groups, self._stack, self._opening, self._since = groups, stack, opening, now
            self._is_pending, self._has_warned = None, False
        waited = now - self._since
        if waited < self._min_seconds:
            return 0.0
        if self._is_pending is None:
            # The short status may list the last ones in the wrong order; only the record itself is reliable.
            self._is_pending = opening is not None or any(not operation.done for operation in recent_operations())
        return waited if self._is_pending else 0.0

    def seconds_opening(self) -> float:
        """Return how long the main thread had been opening a group at the last `seconds_waited`; else 0."""
        return 0.0 if self._opening is None else time.monotonic() - self._since

    def warn_once(self) -> bool:
        """Return whether this wait has not been warned about yet."""
        is_first, self._has_warned = not self._has_warned, True
        return is_first


def _came_from_collective(error: BaseException | None) -> bool:
    """Whether an exception was raised by a collective."""
    while error is not None:
        if isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
