"""The trackers of one run, from `init_trackers` to the end of the process."""

from __future__ import annotations

import atexit
import logging
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from paceline.errors import TrackingError
from paceline.tracking.base import BlankTracker, GeneralTracker
from paceline.tracking.log_values import LogEntry, copy_to_host
from paceline.tracking.registry import load_backend

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

__all__ = ["Trackers"]

logger = logging.getLogger(__name__)
_MAX_PENDING = 64


class Trackers:
    """Opens trackers, passes on what is logged, and closes them, however the process ends.

    A tracker that fails during training is reported and skipped from then on: a full disk or an unavailable service
    should not end the training. A tracker that fails to open is an error.

    Args:
        chosen: Names of known trackers, and tracker objects.
        folder: Where trackers write their files.
        is_main: Whether this is rank 0.
        is_requested: Whether trackers were requested, so that logging before they are opened is an error.
    """

    def __init__(
        self, chosen: Sequence[str | GeneralTracker], folder: Path | None, *, is_main: bool, is_requested: bool = True
    ) -> None:
        self.active: list[Any] = []
        self.was_started = False
        self._was_closed = False
        self.chosen = list(chosen)
        self._folder = folder
        self._is_main = is_main
        self._is_requested = is_requested and bool(chosen)
        self._pending: deque[LogEntry] = deque()
        self._failed: set[int] = set()

    def start(
        self, project: str, *, settings: Mapping[str, Mapping[str, Any]], run_name: str | None = None
    ) -> Sequence[Any]:
        """Open every tracker that records on this rank.

        Args:
            project: The project's name.
            settings: Keyword arguments that open the trackers, by their names.
            run_name: The run's name; None leaves it to the trackers.

        Returns:
            The open trackers.
        """
        self.finish()
        # A new tracker may get the id of one that is gone.
        self._failed.clear()
        self.was_started, self._was_closed = True, False
        try:
            for one in self.chosen:
                if not isinstance(one, str):
                    if self._is_main or not getattr(one, "main_process_only", True):
                        self._open(one)
                elif self._is_main:
                    backend = load_backend(one)
                    self._open(backend(project, self._folder, run_name, settings.get(one, {})))
        finally:
            # Closes them if the script fails or forgets to. Registered last, it is called first: the packages' own
            # handlers, registered on import, would mark a crashed run as finished.
            atexit.register(self.finish_at_exit)
        return self.active

    def _open(self, tracker: Any) -> None:
        start = getattr(tracker, "start", None)
        if start is not None:
            start()
        self.active.append(tracker)

    def store(self, config: Mapping[str, Any]) -> None:
        """Pass the run's settings to every tracker."""
        for tracker in self.active:
            tracker.store_init_configuration(dict(config))

    def record(self, more: Mapping[str, Any]) -> None:
        """Add to `run.json`, if there is a folder for it."""
        for tracker in self.active:
            if tracker.name == "jsonl":
                tracker.store_record(more)

    def log(
        self,
        values: Mapping[str, Any],
        step: int | None,
        settings: Mapping[str, Mapping[str, Any]],
        facts: Callable[[], dict[str, Any]],
    ) -> None:
        """Queue values, and write those that have reached the host.

        Args:
            values: Values by name; tensors are copied to the host asynchronously.
            step: The run's step.
            settings: Keyword arguments for trackers, by their names.
            facts: Returns what the run adds to the JSON lines.

        Raises:
            TrackingError: The requested trackers have not been opened.
        """
        if not self.active:
            if self._is_requested and self._is_main and not self.was_started:
                raise TrackingError(
                    "log() before init_trackers()",
                    "init_trackers opens the trackers; values logged before it would be lost",
                    "Call accelerator.init_trackers(project_name) before the loop",
                )
            if self._was_closed:
                self._was_closed = False  # warn once
                logger.warning(
                    "log() was called after the trackers were closed: %s and all later values are lost.",
                    ", ".join(values),
                )
            return
        copies, copied = copy_to_host(values)
        self._pending.append(LogEntry(copies, step, settings, {"time": round(time.time(), 3), **facts()}, copied))
        while self._pending and (self._pending[0].is_ready or len(self._pending) > _MAX_PENDING):
            self._write(self._pending.popleft())

    def flush(self) -> None:
        """Write everything that is queued; waits for the device."""
        while self._pending:
            self._write(self._pending.popleft())

    def _write(self, entry: LogEntry) -> None:
        values = entry.read()
        for tracker in self.active:
            if id(tracker) in self._failed:
                continue
            more = dict(entry.settings.get(tracker.name, {}))
            if tracker.name == "jsonl":
                more = {**entry.facts, **more}
            try:
                tracker.log(dict(values), step=entry.step, **more)
            except Exception as error:
                self._skip_from_now_on(tracker, error)

    def _skip_from_now_on(self, tracker: Any, error: Exception) -> None:
        self._failed.add(id(tracker))
        logger.warning(
            "The tracker %s failed (%s: %s); the run continues without it.", tracker.name, type(error).__name__, error
        )

    def get(self, name: str, *, unwrap: bool) -> Any:
        """Return a tracker by name; on a rank that records nothing, one whose calls do nothing.

        Args:
            name: The tracker's name.
            unwrap: Return the object of its package instead.

        Raises:
            TrackingError: There is no tracker of that name, or none has been opened yet.
        """
        names = [one if isinstance(one, str) else one.name for one in self.chosen]
        if name not in names:
            raise TrackingError(
                f"get_tracker({name!r})",
                f"The trackers of this run are {', '.join(names) or 'none'}",
                "Pass one of these names, or add the tracker to log_with",
            )
        if not self.was_started and self._is_main:
            raise TrackingError(
                f"get_tracker({name!r}) before init_trackers",
                "init_trackers opens the trackers",
                "Call accelerator.init_trackers(project_name) first",
            )
        for tracker in self.active:
            if tracker.name == name:
                return tracker.tracker if unwrap else tracker
        return BlankTracker()

    def finish(self, *, crashed: bool = False) -> None:
        """Write what is queued and close every tracker; no-op when none is open."""
        if not self.active:
            return
        atexit.unregister(self.finish_at_exit)
        try:
            self.flush()
        except Exception as error:
            logger.warning("The last log entries are lost (%s: %s).", type(error).__name__, error)
            self._pending.clear()
        active, self.active = self.active, []
        self._was_closed = True
        for tracker in active:
            try:
                tracker.crashed = crashed
                finish = getattr(tracker, "finish", None)
                if finish is not None:
                    finish()
            except Exception as error:
                logger.warning("The tracker %s did not close (%s: %s).", tracker.name, type(error).__name__, error)

    def finish_at_exit(self) -> None:
        """Close every tracker at interpreter exit, as crashed after an uncaught exception."""
        self.finish(crashed=getattr(sys, "last_value", None) is not None)
