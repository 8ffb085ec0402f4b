"""A configuration for what runs inside, without a variable in the environment."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from paceline.config.resolved import Resolved

__all__ = ["handed_over", "in_force"]

_HANDED: ContextVar[Resolved | None] = ContextVar("paceline_configuration", default=None)


@contextmanager
def in_force(resolved: Resolved) -> Iterator[None]:
    """Let an `Accelerator` that is built inside, in this thread, find a configuration as if it was launched with it."""
    token = _HANDED.set(resolved)
    try:
        yield
    finally:
        _HANDED.reset(token)


def handed_over() -> Resolved | None:
    """Return the configuration in force here; None outside of `in_force`."""
    return _HANDED.get()
