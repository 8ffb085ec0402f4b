"""Errors of the kinds that programs catch: `ValueError`, `TypeError`, `RuntimeError`, `NotImplementedError`."""

from __future__ import annotations

from typing import Any, NoReturn

from paceline.errors import PacelineError

__all__ = ["InvalidValueError", "NotInitializedError", "UnsupportedError", "WrongTypeError", "unsupported"]


class InvalidValueError(PacelineError, ValueError):
    """A value that is not allowed, or that contradicts another."""


class WrongTypeError(PacelineError, TypeError):
    """An object of a type that the call does not accept."""


class NotInitializedError(PacelineError, RuntimeError):
    """A call that needs a state, before there is one."""


class UnsupportedError(PacelineError, NotImplementedError):
    """A function of Accelerate that paceline does not have."""


def unsupported(name: str, why: str, todo: str) -> Any:
    """Return a function that raises `UnsupportedError`: importing the name works, calling it does not.

    Args:
        name: The function's name.
        why: Why it is not supported.
        todo: What to do instead.
    """

    def refuse(*_args: Any, **_kwargs: Any) -> NoReturn:
        raise UnsupportedError(f"{name} was called", why, todo)

    refuse.__name__ = refuse.__qualname__ = name.rpartition(".")[2]
    refuse.__doc__ = f"Raise an error: {why}."
    return refuse
