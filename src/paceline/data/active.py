"""The loaders whose passes are going on."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from paceline.data.loader import PreparedDataLoader

__all__ = ["ActiveLoaders"]


class ActiveLoaders:
    """Knows which prepared loader is being iterated; of nested loops, the innermost."""

    def __init__(self) -> None:
        self._passes: list[tuple[object, PreparedDataLoader]] = []

    @property
    def current(self) -> PreparedDataLoader | None:
        """The loader of the innermost pass that has begun and not ended."""
        return self._passes[-1][1] if self._passes else None

    @contextmanager
    def during(self, loader: PreparedDataLoader) -> Iterator[None]:
        """Count `loader` as active while the body runs, in whatever order passes end."""
        token = object()
        self._passes.append((token, loader))
        try:
            yield
        finally:
            self._passes = [entry for entry in self._passes if entry[0] is not token]
