"""Taking turns: one rank does the work, the others follow when it is done."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from paceline.collectives.wording import ranks_text
from paceline.errors import CollectiveError

if TYPE_CHECKING:
    from paceline.collectives.group import Group

__all__ = ["main_process_first"]

_FOLLOWS = "follows"
_DONE = "done"


@contextmanager
def main_process_first(group: Group, is_first: bool) -> Iterator[None]:
    """Run the body on the rank (or ranks, one per node) with `is_first`, then on all others.

    Collective: every rank must enter it.

    Raises:
        CollectiveError: On the other ranks, when a first one raised; it holds that one's traceback. On all
            ranks, when none is first.
    """
    if not is_first:
        _check(group.all_gather_object(_FOLLOWS))
        yield
        return
    try:
        yield
    except BaseException as error:
        report = "".join(traceback.format_exception(error))
        # What this rank raises must come out even if the others can no longer be told.
        with suppress(CollectiveError):
            group.all_gather_object(report)
        raise
    _check(group.all_gather_object(_DONE))


def _check(reports: list[str]) -> None:
    failed = [rank for rank, report in enumerate(reports) if report not in (_FOLLOWS, _DONE)]
    if failed:
        raise CollectiveError(
            f"{ranks_text(failed, capital=True)} went first and failed",
            "The other ranks build on what it was to do",
            f"Its own error was:\n{reports[failed[0]]}",
        )
    if _DONE not in reports:
        raise CollectiveError(
            "No rank went first", "Somebody has to do the work", "Pass is_first=True on one rank of the group"
        )
