"""The loaders whose passes are going on."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from paceline.collectives import BatchCounts

__all__ = ["ActiveLoaders", "LoaderInUse"]


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


def _one() -> int:
    return 1


class ActiveLoaders:
    """Knows which prepared loader is being iterated; of nested loops, the innermost.

    Attributes:
        before_batch: Called before each batch is handed out, in passes in which all ranks get as many.
        micro_batches: Tells how many batches an optimizer step takes.
        watch: Called with the loader and each batch that it hands out; None costs nothing.
    """

    def __init__(self) -> None:
        self.before_batch: Callable[[], None] = _nothing
        self.micro_batches: Callable[[], int] = _one
        self.watch: Callable[[Any, Any], None] | None = None
        self._passes: list[tuple[object, LoaderInUse]] = []

    @property
    def current(self) -> LoaderInUse | None:
        """The loader of the innermost pass that has begun and not ended."""
        return self._passes[-1][1] if self._passes else None

    @contextmanager
    def during(self, loader: LoaderInUse) -> Iterator[None]:
        """Count `loader` as active while the body runs, in whatever order passes end."""
        token = object()
        self._passes.append((token, loader))
        try:
            yield
        finally:
            self._passes = [entry for entry in self._passes if entry[0] is not token]
