"""What `dynamo_backend="auto"` takes into account, changed for a test."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from paceline.strategies import automatic_compilation

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def compiling_at_once(**changes: Any) -> Iterator[None]:
    """Expect compiling to take no time, keep what is compiled, and change further values of the module."""
    changes = {"_COLD_SECONDS": 0.0, "_WORTHWHILE_RATIO": 1e9} | changes
    changes["known_seconds"] = changes["note_seconds"] = lambda *_: None
    before = {name: getattr(automatic_compilation, name) for name in changes}
    for name, value in changes.items():
        setattr(automatic_compilation, name, value)
    torch._dynamo.reset()
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(automatic_compilation, name, value)
        torch._dynamo.reset()
