"""One save at a time: now, or beside the training that goes on."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from paceline.checkpoint.io.staging import Stager

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from paceline.checkpoint.writing import Content, SaveTimings
    from paceline.collectives import Group

__all__ = ["Saver", "State"]

_LOG = logging.getLogger(__name__)


class State(Protocol):
    """Something that can be saved."""

    def take(self) -> tuple[Content, set[str]]:
        """What this rank brings, in live memory, and the names of the parts that only an optimizer's step changes."""
        ...


S = TypeVar("S", bound=State)


class Saver:
    """Writes checkpoints of one run.

    A save that does not block copies the state to host memory, which is kept for the next one, and a thread writes
    it. A failure of that thread comes up at the next call: of `save`, of `wait`, or at the next step; if none
    follows, a line says it at the end of the program, which waits for the thread.

    Args:
        group: All ranks.

    Attributes:
        times: Seconds that the last save took on this rank; None before the first has ended.
    """

    def __init__(self, group: Group) -> None:
        self._ranks = group
        self._second: Group | None = None
        self._stager = Stager()
        self._thread: threading.Thread | None = None
        self._failures: list[BaseException] = []
        self._listens = False
        self._holds_step = False
        self.times: SaveTimings | None = None

    @property
    def in_flight(self) -> bool:
        """Whether a save has been begun whose end nobody has seen yet."""
        return self._thread is not None

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
        """Write a checkpoint, after the one that is still being written.

        Collective: every rank must call it.

        Args:
            folder: Its name.
            state: What to save.
            blocking: Return when the checkpoint is whole; else as soon as training may go on.
            prepare: Gets the state and the folder that is written into, and returns the state to save; only with
                `blocking`.
            keep: How many numbered checkpoints stay.
            numbered: Whether it is one of those.

        Raises:
            CheckpointError: This save failed, or the one before, on any rank.
        """
        from paceline.checkpoint.writing import run_on_all_ranks, save_checkpoint

        begun = time.perf_counter()
        self.wait()
        if blocking:

            def collect_content(partial: Path) -> Content:
                return (state if prepare is None else prepare(state, partial)).take()[0]

            self.times = save_checkpoint(folder, collect_content, self._group, keep=keep, numbered=numbered)
            self.times.blocked = time.perf_counter() - begun
            return
        group = self._group
        staged: list[Content] = []
        run_on_all_ranks(group, "taken", Path(folder), lambda: staged.append(self._stage(*state.take())))
        (copied,) = staged

        def write() -> None:
            try:
                self._stager.wait()
                times = save_checkpoint(
                    folder, lambda _: copied, group, keep=keep, numbered=numbered, is_blocking=False
                )
                times.blocked = blocked
                self.times = times
            except BaseException as error:
                self._failures.append(error)

        if not self._listens:
            self._listens = True
            atexit.register(_report, self._failures)
        self._thread = threading.Thread(target=write, name="paceline-save")
        self._holds_step = True
        blocked = time.perf_counter() - begun
        self._thread.start()

    def _stage(self, content: Content, updated_by_step: set[str]) -> Content:
        common = content.common
        copies = self._stager.stage({**content.shards, **common.tensors}, updated_by_step=updated_by_step)
        kept = replace(common, tensors={name: copies.pop(name) for name in common.tensors})
        return replace(content, shards=copies, common=kept)

    @property
    def _group(self) -> Group:
        """Ranks that may be spoken to while training speaks to them, too."""
        if self._second is None:
            self._second = self._ranks.open_second()
        return self._second

    def before_step(self) -> None:
        """Let a step that would change what is being copied wait for it, on the device.

        Raises:
            CheckpointError: The save in flight has failed.
        """
        if self._thread is None:
            return
        if self._holds_step:
            self._holds_step = False
            self._stager.hold_stream()
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
            if self._holds_step:
                self._holds_step = False
                self._stager.hold_stream()
        if self._failures:
            raise self._failures.pop()

    def release(self) -> None:
        """Wait for the save in flight, and give the host memory back."""
        self.wait()
        self._stager.release()


def _report(failures: list[BaseException]) -> None:
    """Say at the end of the program what nobody has asked for since."""
    for failure in failures:
        _LOG.error("the last save failed: %s", failure)
