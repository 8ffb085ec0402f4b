"""The loaders whose passes are going on, and which of them a loop ends with."""

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

__all__ = ["ActiveLoaders", "LoaderInUse", "PassInUse"]


class LoaderInUse(Protocol):
    """What a loader says about the batch that is in use."""

    @property
    def end_of_dataloader(self) -> bool:
        """Whether it is the last of its pass."""
        ...

    @property
    def remaining(self) -> int | None:
        """How many come after it; None if that is not known."""
        ...

    @property
    def counts(self) -> BatchCounts | None:
        """How many of its rows are real, on every rank."""
        ...


def _nothing() -> None:
    """Do nothing."""


def _ignore(loader: LoaderInUse) -> None:
    """Do nothing."""


def _one() -> int:
    return 1


class PassInUse:
    """One pass over a loader that is going on, and what the micro-batches make of it."""

    __slots__ = ("_usual", "drawn", "loader", "micro_batches", "site")

    def __init__(self, loader: LoaderInUse) -> None:
        self.loader = loader
        # When it gave its last batch, counted in batches of all passes.
        self.drawn = 0
        # Where the script draws from it.
        self.site: Site | None = None
        # How many micro-batches were made of the batch in use, and of the one before it.
        self.micro_batches = 0
        self._usual = 1

    def begin_micro_batch(self, *, is_new: bool) -> None:
        """Note a micro-batch, the first one of a batch if that `is_new`."""
        if is_new:
            self._usual = self.micro_batches or self._usual
            self.micro_batches = 1
        else:
            self.micro_batches += 1

    @property
    def at_end(self) -> bool:
        """Whether no micro-batch will come after the one in work, if the last batch makes as many as the one before."""
        return self.micro_batches >= self._usual and self.loader.end_of_dataloader

    @property
    def remaining(self) -> int | None:
        """Micro-batches after the one in work; None if that is not known."""
        batches = self.loader.remaining
        return None if batches is None else batches * self._usual + max(0, self._usual - self.micro_batches)


class ActiveLoaders:
    """Knows which prepared loaders are being iterated, and which of them the loop ends with.

    A loop may draw from several loaders, and only one of them ends it. That is the one whose batch came first to the
    micro-batch in work, among those drawn from in the outermost function: a loader behind a generator that begins it
    again and again, or drawn from by `next` inside the loop, does not end it. Loaders that are drawn from at one and
    the same place (`zip`) end together, with the shortest, except one that `itertools.cycle` repeats. A loader that
    gave nothing to the micro-batch, such as one for evaluation, has no say.

    Attributes:
        before_batch: Called before each batch is handed out, in passes in which all ranks get as many.
        micro_batches: Tells how many batches an optimizer step takes.
        watch: Called with the loader and each batch that it hands out; None costs nothing.
        begin_pass: Called with the loader when a pass begins.
        end_pass: The same when it ends, or is left.
    """

    def __init__(self) -> None:
        self.before_batch: Callable[[], None] = _nothing
        self.micro_batches: Callable[[], int] = _one
        self.watch: Callable[[Any, Any], None] | None = None
        self.begin_pass: Callable[[LoaderInUse], None] = _ignore
        self.end_pass: Callable[[LoaderInUse], None] = _ignore
        self._passes: list[PassInUse] = []
        self._drawn = 0
        self._noted = 0
        self._leading: list[PassInUse] = []

    @property
    def current(self) -> LoaderInUse | None:
        """The loader of the innermost pass that has begun and not ended."""
        return self._passes[-1].loader if self._passes else None

    @contextmanager
    def during(self, loader: LoaderInUse) -> Iterator[PassInUse]:
        """Count `loader` as active while the body runs, in whatever order passes end."""
        entry = PassInUse(loader)
        self._passes.append(entry)
        self.begin_pass(loader)
        try:
            yield entry
        finally:
            self._passes = [other for other in self._passes if other is not entry]
            self._leading = [other for other in self._leading if other is not entry]
            self.end_pass(loader)

    def draw(self, entry: PassInUse) -> None:
        """Note that a pass gives a batch; called by the generator that the script draws from."""
        self._drawn += 1
        entry.drawn = self._drawn
        if entry.site is None or len(self._passes) > 1:
            entry.site = Site.of(sys._getframe(2))

    # What windows ask

    def begin_micro_batch(self) -> None:
        """Note that a micro-batch begins, with the batches drawn since the last one."""
        noted, self._noted = self._noted, self._drawn
        fresh = []
        for entry in self._passes:
            is_new = entry.drawn > noted
            entry.begin_micro_batch(is_new=is_new)
            if is_new:
                fresh.append(entry)
        if len(fresh) > 1:
            first = min(fresh, key=_rank_in_loop)
            fresh = [entry for entry in fresh if entry.site == first.site]
        if fresh:
            self._leading = fresh

    @property
    def loop_ends(self) -> bool:
        """Whether the micro-batch in work is the last of its loop; may wait for other ranks."""
        if len(self._leading) == 1:
            return self._leading[0].at_end
        ending = [entry for entry in self._leading if entry.at_end]
        if len(ending) == len(self._leading):
            return bool(ending)
        return any(not _is_cycled(entry.loader) for entry in ending)

    @property
    def remaining(self) -> int | None:
        """Micro-batches of the loop after the one in work, as far as that is known."""
        known = [entry.remaining for entry in self._leading]
        return min((count for count in known if count is not None), default=None)


class Site(NamedTuple):
    """A place in a script from which a loader is drawn.

    Attributes:
        depth: How many functions lie around it.
        frame: Which call of a function, by `id`.
        instruction: Which one of it.
    """

    depth: int
    frame: int
    instruction: int

    @classmethod
    def of(cls, frame: FrameType) -> Site:
        """The place where a function is now."""
        depth, outer = 0, frame.f_back
        while outer is not None:
            depth, outer = depth + 1, outer.f_back
        return cls(depth, id(frame), frame.f_lasti)


def _rank_in_loop(entry: PassInUse) -> tuple[int, int]:
    assert entry.site is not None
    return entry.site.depth, entry.drawn


def _is_cycled(loader: LoaderInUse) -> bool:
    """Whether an `itertools.cycle` draws from a loader, and will repeat its batches when it ends.

    It is drawn from at the same place as what it is zipped with, so that only the object itself tells. All objects
    are looked at, which takes some milliseconds, once where the shorter one of two zipped loaders ends.
    """
    return any(
        type(thing) is cycle and any(_draws_from(inner, loader) for inner in gc.get_referents(thing))
        for thing in gc.get_objects()
    )


def _draws_from(iterator: object, loader: LoaderInUse) -> bool:
    frame = getattr(iterator, "gi_frame", None)
    return frame is not None and frame.f_locals.get("self") is loader
