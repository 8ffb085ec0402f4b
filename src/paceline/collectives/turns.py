"""Taking turns: one rank does the work, the others follow when it is done.

The others wait for a note in the store, not in a collective, so that no timeout ends hours of preparing data.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from paceline.environment.logging import get_logger
from paceline.errors import CollectiveError

if TYPE_CHECKING:
    from paceline.collectives.group import Board, Group

__all__ = ["main_process_first"]

_LOG = get_logger(__name__)
_DONE = "done"
# Seconds between two looks, at first and at most, and between two remarks about the wait.
_FIRST_LOOK, _LOOK = 0.01, 0.5
_REMARK = 60.0


@contextmanager
def main_process_first(group: Group, is_first: bool, among: str = "all") -> Iterator[None]:
    """Run the body on the rank with `is_first`, then on all others.

    Collective: every rank must enter it.

    Args:
        group: The ranks.
        is_first: Whether this rank goes first; one of those with the same `among` must.
        among: Names the ranks that follow the same one, such as those of a machine.

    Raises:
        CollectiveError: On the other ranks, when the first one raised; it holds that one's traceback.
    """
    if group.size == 1:
        yield
        return
    # Every rank counts its own turns, in the store, so that all of them mean the same one by a number.
    board = group.open_board(f"turns/{among}")
    turn = board.count(f"by/{group.rank}")
    if not is_first:
        _follow(board, turn)
        yield
        return
    board.post(f"{turn}/who", str(group.rank))
    try:
        yield
    except BaseException as error:
        board.post(f"{turn}/end", f"{_headline(error)}\n{''.join(traceback.format_exception(error))}")
        raise
    board.post(f"{turn}/end", _DONE)


def _follow(board: Board, turn: int) -> None:
    """Wait until the first rank is through; say now and then that this takes its time."""
    speaks = board.count(f"{turn}/followers") == 1
    began = said = time.monotonic()
    pause = _FIRST_LOOK
    while (end := board.read(f"{turn}/end")) is None:
        time.sleep(pause)
        pause = min(2 * pause, _LOOK)
        if speaks and time.monotonic() - said >= _REMARK:
            said = time.monotonic()
            who = board.read(f"{turn}/who")
            where = f"rank {who} is through" if who is not None else "the rank that goes first has come"
            _LOG.warning("waiting until %s, for %.0f s now", where, said - began, main_process_only=False)
    if end != _DONE:
        headline, _, report = end.partition("\n")
        raise CollectiveError(
            f"Rank {board.read(f'{turn}/who')} went first and failed: {headline}",
            "The other ranks build on what it was to do",
            f"Its own error was:\n{report}",
        )


def _headline(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip().replace("\n", " ")
