"""Errors of the kinds that programs catch: `ValueError`, `TypeError`, `RuntimeError`, `NotImplementedError`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

from paceline.errors import ConfigError, PacelineError, PrepareError

__all__ = [
    "InvalidValueError",
    "MissingKeyError",
    "NotInitializedError",
    "UnsupportedError",
    "WrongTypeError",
    "unsupported",
    "value_errors",
]


F = TypeVar("F", bound=Callable[..., Any])
# Classes of errors that are a `ValueError` too, by the core's own class.
_VALUE_ERRORS: dict[type[PacelineError], type[PacelineError]] = {}


class InvalidValueError(PacelineError, ValueError):
    """A value that is not allowed, or that contradicts another."""


class MissingKeyError(PacelineError, KeyError):
    """A name that should be there."""

    # KeyError's own text is the repr of the message.
    __str__ = Exception.__str__


class WrongTypeError(PacelineError, TypeError):
    """An object of a type that the call does not accept."""


class NotInitializedError(PacelineError, RuntimeError):
    """A call that needs a state, before there is one."""


class UnsupportedError(PacelineError, NotImplementedError):
    """A function of Accelerate that paceline does not have."""


@contextmanager
def value_errors() -> Iterator[None]:
    """Let what the core refuses be a `ValueError` too, for programs that catch that."""
    try:
        yield
    except (ConfigError, PrepareError) as error:
        if isinstance(error, ValueError):
            raise
        kind = _also_value_error(type(error))
        copied = kind.__new__(kind, *error.args)
        vars(copied).update(vars(error))
        raise copied.with_traceback(error.__traceback__) from error.__cause__


def _also_value_error(kind: type[PacelineError]) -> type[PacelineError]:
    if kind not in _VALUE_ERRORS:
        _VALUE_ERRORS[kind] = type(kind.__name__, (kind, ValueError), {"__module__": kind.__module__})
    return _VALUE_ERRORS[kind]


def unsupported(why: str, todo: str) -> Callable[[F], F]:
    """Make a decorator for functions that are importable, with their signature, and raise `UnsupportedError`.

    Args:
        why: Why they are not supported.
        todo: What to do instead.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def refuse(*_args: Any, **_kwargs: Any) -> NoReturn:
            raise UnsupportedError(f"{function.__qualname__} was called", why, todo)

        # For the table of what is supported.
        refuse.reason = (why, todo)  # type: ignore[attr-defined]
        return refuse  # type: ignore[return-value]

    return decorate
