"""Errors about fields of `TrainingArguments`, worded alike wherever they are found."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from paceline.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["WHERE", "field_error", "field_problem", "located"]

WHERE = "TrainingArguments(…)"


def field_problem(field: str, what: str, why: str = "", hint: str = "") -> Problem:
    """One problem with a field: what was seen, why it cannot work, what to do."""
    return Problem(WHERE, field, what, why, hint)


def field_error(field: str, what: str, why: str = "", hint: str = "") -> ConfigError:
    """An error about one field."""
    return ConfigError([field_problem(field, what, why, hint)])


def located(problems: Iterable[Problem], sources: Mapping[str, str]) -> list[Problem]:
    """Let problems with fields name the place where the value was written.

    Args:
        problems: Problems with fields, and others, which stay as they are.
        sources: The place of each field, and of each key inside a field, such as `run.yaml:3`.
    """
    return [replace(problem, where=_source(problem, sources)) for problem in problems]


def _source(problem: Problem, sources: Mapping[str, str]) -> str:
    if problem.where != WHERE:
        return problem.where
    # What is missing in one field may have been asked for by another, which the text names.
    words = re.findall(r"\w+", f"{problem.what} {problem.why}")
    names = (problem.key, problem.key.partition(".")[0], *words)
    return next((sources[name] for name in names if name in sources), WHERE)
