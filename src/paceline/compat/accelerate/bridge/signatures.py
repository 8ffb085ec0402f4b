"""Functions of the core with Accelerate's arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = ["with_accelerates_arguments"]

P = ParamSpec("P")
R = TypeVar("R")


def with_accelerates_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function that does the same, without the keyword-only arguments, which only paceline has."""
    signature = inspect.signature(function)
    shared = [each for each in signature.parameters.values() if each.kind is not each.KEYWORD_ONLY]
    accelerates = signature.replace(parameters=shared)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        accelerates.bind(*args, **kwargs)
        return function(*args, **kwargs)

    call.__signature__ = accelerates  # type: ignore[attr-defined]
    return call
