"""Saving one checkpoint at a time, either blocking or in a background thread while training continues."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from paceline.checkpoint.io.staging import Stager
from paceline.errors import CollectiveError

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator

    from paceline.checkpoint.save_load import Content, SaveTimings
    from paceline.collectives import Group

__all__ = ["SaveableState", "Saver"]

_LOG = logging.getLogger(__name__)


class SaveableState(Protocol):
    """Something that can be saved."""

    def collect(self) -> tuple[Content, set[str]]:
        """What this rank saves, in live memory, and the names of the shards that only an optimizer step changes."""
        ...


S = TypeVar("S", bound=SaveableState)


class Saver:
    """Writes the checkpoints of one run.

    A non-blocking save copies the state to host memory, which is reused by the next one, and a thread writes it. If
    the thread fails, the next call of `save`, `wait` or `before_step` raises its error. If none follows, the error is
    logged at the end of the program, which waits for the thread.

    Args:
        group: All ranks.

    Attributes:
        times: How long the last save took on this rank; None before the first has ended.
    """

    def __init__(self, group: Group) -> None:
        self._ranks = group
        self._second: Group | None = None
        self._stager = Stager()
        self._thread: threading.Thread | None = None
        self._failures: list[BaseException] = []
        self._reports_at_exit = False
        self._next_step_waits = False
        self.times: SaveTimings | None = None

    def save(
        self,
        folder: str | os.PathLike[str],
        state: S,
        *,
        blocking: bool,
        prepare: Callable[[S, Path], S] | None = None,
        keep: int | None = None,
        numbered: bool = False,
    ) -> None:
        """Write a checkpoint, after waiting for a background save that is still in flight.

        Collective: every rank must call it.

        Args:
            folder: Its path.
            state: What to save.
            blocking: Return when the checkpoint is complete; else as soon as training may continue.
            prepare: Called with the state and the folder being written; returns the state to save. Only if `blocking`.
            keep: How many numbered checkpoints to keep.
            numbered: Whether this is a numbered one.

        Raises:
            CheckpointError: This save or the one before failed on any rank.
            CollectiveError: Another rank is gone.
        """
        from paceline.checkpoint.save_load import run_on_all_ranks, save_checkpoint

        begin = time.perf_counter()
        self.wait()
        group = self._group
        if blocking:

            def collect_content(partial: Path) -> Content:
                prepared = state
                if prepare is not None:
                    prepared = prepare(state, partial)
                return prepared.collect()[0]

            with _naming_save(folder):
                self.times = save_checkpoint(folder, collect_content, group, keep=keep, numbered=numbered)
            self.times.blocked = time.perf_counter() - begin
            return
        with _naming_save(folder):
            copied = run_on_all_ranks(
                group, "copied to host memory", Path(folder), lambda: self._stage(*state.collect())
            )

        def write() -> None:
            try:
                self._stager.wait()
                with _naming_save(folder):
                    times = save_checkpoint(
                        folder, lambda _: copied, group, keep=keep, numbered=numbered, is_blocking=False
                    )
                times.blocked = blocked
                self.times = times
            except BaseException as error:
                self._failures.append(error)

        if not self._reports_at_exit:
            self._reports_at_exit = True
            atexit.register(_report, self._failures)
        self._thread = threading.Thread(target=write, name="paceline-save")
        self._next_step_waits = True
        blocked = time.perf_counter() - begin
        self._thread.start()

    def _stage(self, content: Content, updated_by_step: set[str]) -> Content:
        common = content.common
        copies = self._stager.stage({**content.shards, **common.tensors}, updated_by_step=updated_by_step)
        copied_common = replace(common, tensors={name: copies.pop(name) for name in common.tensors})
        return replace(content, shards=copies, common=copied_common)

    @property
    def _group(self) -> Group:
        """A second process group, whose collectives do not mix with those of training."""
        if self._second is None:
            self._second = self._ranks.open_second()
        return self._second

    def before_step(self) -> None:
        """Make the next optimizer step wait, on the device, for the copies of what it changes.

        Raises:
            CheckpointError: The save in flight has failed.
        """
        if self._thread is None:
            return
        self._hold_stream()
        if not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for the save in flight.

        Raises:
            CheckpointError: It failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._hold_stream()
        if self._failures:
            raise self._failures.pop()

    def _hold_stream(self) -> None:
        if self._next_step_waits:
            self._next_step_waits = False
            self._stager.hold_stream()

    def release(self) -> None:
        """Wait for the save in flight, and free the host memory.

        Raises:
            CheckpointError: The save failed; the memory is freed nevertheless.
        """
        try:
            self.wait()
        finally:
            self._stager.release()


@contextmanager
def _naming_save(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Add to the error of an exchange which checkpoint was not finished, and which one is there."""
    try:
        yield
    except CollectiveError as error:
        # Needed here alone: an Accelerator that saves nothing does without the format.
        from paceline.checkpoint.folder import real_folder

        path = real_folder(folder)
        raise CollectiveError(
            f"The checkpoint {path} was not finished: {error.saw}", error.why, f"{error.todo}. {_what_is_left(path)}"
        ) from error


def _what_is_left(folder: Path) -> str:
    from paceline.checkpoint.catalog import find_checkpoints

    try:
        complete = [entry.folder for entry in find_checkpoints(folder.parent) if entry.checkpoint is not None]
    except OSError as error:
        return f"Whether there is a complete checkpoint in {folder.parent} could not be found out ({error})"
    if complete:
        return f"The newest complete checkpoint is {complete[0]}"
    return f"There is no complete checkpoint in {folder.parent}"


def _report(failures: list[BaseException]) -> None:
    """Log at the end of the program the failures that no call has raised."""
    for failure in failures:
        _LOG.error("the last save failed: %s", failure)
