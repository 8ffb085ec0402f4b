"""Tracks which prepared loaders are being iterated, and which of them ends the training loop."""

from __future__ import annotations

import gc
import sys
from contextlib import contextmanager
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from paceline.collectives import BatchCounts

__all__ = ["ActiveIteration", "ActiveLoaders", "LoaderStatus"]


class LoaderStatus(Protocol):
    """What a loader reports about the current batch."""

    @property
    def end_of_dataloader(self) -> bool:
        """Whether it is the last one of the iteration."""
        ...

    @property
    def remaining(self) -> int | None:
        """How many batches come after it; None if unknown."""
        ...

    @property
    def counts(self) -> BatchCounts | None:
        """How many samples it has on every rank, without padding."""
        ...


def _ignore(loader: LoaderStatus) -> None:
    """Do nothing."""


def _one() -> int:
    return 1


class ActiveIteration:
    """A running iteration over a loader, and the micro-batches made of its batches.

    A batch may be split into several micro-batches; the last batch is expected to make as many as the one before it.
    """

    __slots__ = ("_previous_micro_batches", "call_site", "last_draw", "loader", "micro_batches")

    def __init__(self, loader: LoaderStatus) -> None:
        self.loader = loader
        # When it yielded its last batch, counted in batches of all iterations.
        self.last_draw = 0
        # Where the script takes batches from it.
        self.call_site: CallSite | None = None
        # How many micro-batches were made of the current batch, and of the one before it.
        self.micro_batches = 0
        self._previous_micro_batches = 1

    def begin_micro_batch(self, *, is_new: bool) -> None:
        """Count a micro-batch; `is_new` says whether it is the first one of a batch."""
        if is_new:
            self._previous_micro_batches = self.micro_batches or self._previous_micro_batches
            self.micro_batches = 1
        else:
            self.micro_batches += 1

    @property
    def at_end(self) -> bool:
        """Whether the current micro-batch is expected to be the last one."""
        return self.micro_batches >= self._previous_micro_batches and self.loader.end_of_dataloader

    @property
    def remaining(self) -> int | None:
        """Micro-batches expected after the current one; None if unknown."""
        batches = self.loader.remaining
        if batches is None:
            return None
        expected = self._previous_micro_batches
        return batches * expected + max(0, expected - self.micro_batches)


class ActiveLoaders:
    """Tracks which prepared loaders are being iterated, and which of them ends the loop.

    A loop may take batches from several loaders, and only one of them ends it: the one whose batch for the current
    micro-batch was taken first, in the outermost function. A loader behind a generator that restarts it, or one that
    `next` reads inside the loop, does not end it. Loaders that are read at the same place (`zip`) end with the shortest
    one, not counting one that `itertools.cycle` repeats. A loader that contributed nothing to the micro-batch, such as
    one for evaluation, is ignored.

    Attributes:
        before_batch: Called with the loader before it yields a batch, in iterations in which all ranks get the same
            number; None for no call.
        micro_batches: Returns how many micro-batches make an optimizer step.
        watch: Called with the loader and each batch that it yields; None for no call.
        on_iteration_start: Called with the loader when an iteration begins.
        on_iteration_end: Called with the loader when an iteration ends or is broken off.
    """

    def __init__(self) -> None:
        self.before_batch: Callable[[LoaderStatus], None] | None = None
        self.micro_batches: Callable[[], int] = _one
        self.watch: Callable[[Any, Any], None] | None = None
        self.on_iteration_start: Callable[[LoaderStatus], None] = _ignore
        self.on_iteration_end: Callable[[LoaderStatus], None] = _ignore
        self._iterations: list[ActiveIteration] = []
        # Batches yielded by all iterations, and how many of them the current micro-batch has seen.
        self._draws = 0
        self._seen_draws = 0
        # The iterations that may end the loop.
        self._leading: list[ActiveIteration] = []

    @property
    def current(self) -> LoaderStatus | None:
        """The loader of the innermost iteration that has begun and not ended."""
        return self._iterations[-1].loader if self._iterations else None

    @contextmanager
    def during(self, loader: LoaderStatus) -> Iterator[ActiveIteration]:
        """Count `loader` as active while the body runs; iterations may end in any order."""
        iteration = ActiveIteration(loader)
        self._iterations.append(iteration)
        self.on_iteration_start(loader)
        try:
            yield iteration
        finally:
            self._iterations = [other for other in self._iterations if other is not iteration]
            self._leading = [other for other in self._leading if other is not iteration]
            self.on_iteration_end(loader)

    def draw(self, iteration: ActiveIteration) -> None:
        """Record that an iteration yields a batch; called by the generator that the script iterates."""
        self._draws += 1
        iteration.last_draw = self._draws
        if iteration.call_site is None or len(self._iterations) > 1:
            iteration.call_site = CallSite.of(sys._getframe(2))

    # For the accumulation window

    def begin_micro_batch(self) -> None:
        """Record that a micro-batch begins, made of the batches yielded since the last one."""
        seen, self._seen_draws = self._seen_draws, self._draws
        contributing = []
        for iteration in self._iterations:
            is_new = iteration.last_draw > seen
            iteration.begin_micro_batch(is_new=is_new)
            if is_new:
                contributing.append(iteration)
        if len(contributing) > 1:
            outermost = min(contributing, key=_order_in_loop)
            contributing = [iteration for iteration in contributing if iteration.call_site == outermost.call_site]
        if contributing:
            self._leading = contributing

    @property
    def loop_ends(self) -> bool:
        """Whether the current micro-batch is the last of its loop; may wait for other ranks."""
        if len(self._leading) == 1:
            return self._leading[0].at_end
        ending = [iteration for iteration in self._leading if iteration.at_end]
        if len(ending) == len(self._leading):
            return bool(ending)
        return any(not _is_cycled(iteration.loader) for iteration in ending)

    @property
    def remaining(self) -> int | None:
        """Micro-batches of the loop after the current one; None if unknown."""
        remaining = [iteration.remaining for iteration in self._leading]
        return min((count for count in remaining if count is not None), default=None)

    def ends_with_another(self, loader: LoaderStatus) -> bool:
        """Whether a loop that reads several loaders at one place ends with the current batch, before `loader` does.

        May wait for other ranks.
        """
        own = next((i for i in reversed(self._iterations) if i.loader is loader and i.last_draw), None)
        if own is None or own.call_site is None or len(self._iterations) == 1:
            return False
        others = [i.loader for i in self._iterations if i is not own and i.call_site == own.call_site]
        return any(other.end_of_dataloader and not _is_cycled(other) for other in others)


class CallSite(NamedTuple):
    """The place in a script that takes a batch from a loader.

    Attributes:
        depth: The number of frames on the stack below it.
        frame: The `id` of the frame.
        instruction: The index of the instruction in that frame.
    """

    depth: int
    frame: int
    instruction: int

    @classmethod
    def of(cls, frame: FrameType) -> CallSite:
        """Return where a frame is now."""
        depth, outer = 0, frame.f_back
        while outer is not None:
            depth, outer = depth + 1, outer.f_back
        return cls(depth, id(frame), frame.f_lasti)


def _order_in_loop(iteration: ActiveIteration) -> tuple[int, int]:
    assert iteration.call_site is not None
    return iteration.call_site.depth, iteration.last_draw


def _is_cycled(loader: LoaderStatus) -> bool:
    """Whether an `itertools.cycle` reads a loader, and will repeat its batches when it ends.

    It is read at the same place as what it is zipped with, so only the `cycle` object itself shows it. Searching all
    objects takes some milliseconds, once, when the shorter one of two zipped loaders ends.
    """
    cycles = [candidate for candidate in gc.get_objects() if type(candidate) is cycle]
    return any(_iterates(inner, loader) for cycled in cycles for inner in gc.get_referents(cycled))


def _iterates(iterator: object, loader: LoaderStatus) -> bool:
    frame = getattr(iterator, "gi_frame", None)
    return frame is not None and frame.f_locals.get("self") is loader
