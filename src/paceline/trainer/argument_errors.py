"""Errors about fields of `TrainingArguments`, worded alike wherever they are found."""

from __future__ import annotations

from paceline.errors import ConfigError, Problem

__all__ = ["WHERE", "field_error", "field_problem"]

WHERE = "TrainingArguments(…)"


def field_problem(field: str, what: str, why: str = "", hint: str = "") -> Problem:
    """One problem with a field: what was seen, why it cannot work, what to do."""
    return Problem(WHERE, field, what, why, hint)


def field_error(field: str, what: str, why: str = "", hint: str = "") -> ConfigError:
    """An error about one field."""
    return ConfigError([field_problem(field, what, why, hint)])
