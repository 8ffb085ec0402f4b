"""Reads and changes environment variables."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from paceline.compat.accelerate.settings.errors import InvalidValueError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "clear_environment",
    "get_int_from_env",
    "maybe_flag",
    "parse_choice_from_env",
    "parse_flag_from_env",
    "patch_environment",
    "str_to_bool",
]

T = TypeVar("T")
_TRUE = ("y", "yes", "t", "true", "on", "1")
_FALSE = ("n", "no", "f", "false", "off", "0")


def str_to_bool(value: str, to_bool: bool = False) -> int | bool:
    """Read a word such as yes, on, true or 1, or its opposite.

    Args:
        value: The word, in any case.
        to_bool: Return a bool instead of 1 or 0.

    Raises:
        InvalidValueError: It is none of them.
    """
    word = value.lower()
    if word not in (*_TRUE, *_FALSE):
        raise InvalidValueError(
            f"{value!r} is given where a truth value is expected",
            "It is neither true nor false",
            f"Write one of {', '.join((*_TRUE, *_FALSE))}",
        )
    answer = word in _TRUE
    return answer if to_bool else int(answer)


def get_int_from_env(env_keys: Iterable[str], default: int) -> int:
    """Return the first variable that holds a number of at least 0, or the default."""
    numbers = (int(os.environ.get(key, -1)) for key in env_keys)
    return next((number for number in numbers if number >= 0), default)


def parse_flag_from_env(key: str, default: bool = False) -> bool:
    """Read a truth value from a variable."""
    return str_to_bool(os.environ.get(key, str(default))) == 1


def maybe_flag(key: str) -> bool | None:
    """Read a truth value from a variable; None when it is not set."""
    return parse_flag_from_env(key) if key in os.environ else None


def parse_choice_from_env(key: str, default: T | str = "no") -> str:
    """Read a variable as text."""
    return os.environ.get(key, str(default))


@contextmanager
def clear_environment() -> Iterator[None]:
    """Run the block with no environment variables, and restore them all afterwards."""
    saved = dict(os.environ)
    os.environ.clear()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)


@contextmanager
def patch_environment(**kwargs: object) -> Iterator[None]:
    """Run the block with some variables set, and restore them afterwards.

    Args:
        **kwargs: The variables; their names are written in upper case.
    """
    values = {name.upper(): str(value) for name, value in kwargs.items()}
    saved = {name: os.environ[name] for name in values if name in os.environ}
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            os.environ.pop(name, None)
        os.environ.update(saved)
