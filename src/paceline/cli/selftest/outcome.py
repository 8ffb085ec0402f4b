"""The result of one check of `paceline test`."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from paceline.errors import PacelineError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CheckFailed", "Outcome", "run_check"]


class CheckFailed(PacelineError):
    """A check did not pass."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one check.

    Attributes:
        section: The strategy and precision that it checks; empty for checks that concern all.
        name: The name of the check.
        passed: Whether it passed.
        seconds: How long it took, in seconds.
        saw: What was seen.
        why: Why that is wrong; empty if it passed.
        todo: What to do; empty if it passed.
    """

    section: str
    name: str
    passed: bool
    seconds: float
    saw: str
    why: str = ""
    todo: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain values for JSON."""
        return asdict(self)


def run_check(section: str, name: str, check: Callable[[], str]) -> Outcome:
    """Run a check, which returns what it saw or raises."""
    begun = time.perf_counter()
    try:
        saw, why, todo, passed = check(), "", "", True
    except PacelineError as error:
        saw, why, todo, passed = error.saw or str(error), error.why, error.todo, False
    except Exception as error:
        passed = False
        first_line = str(error).strip().partition("\n")[0]
        saw = f"{type(error).__name__}: {first_line}"
        why = "The check itself should not fail"
        todo = "Run again with --keep FOLDER and read what the ranks printed there"
    return Outcome(section, name, passed, time.perf_counter() - begun, saw, why, todo)
