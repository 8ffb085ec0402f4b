"""Runs a block on one rank first, and then on the others.

The others poll the store instead of waiting in a collective, so that no timeout ends hours of data preparation.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from paceline.errors import CollectiveError

if TYPE_CHECKING:
    from paceline.collectives.group import Board, Group

__all__ = ["main_process_first"]

_LOG = logging.getLogger(__name__)
_DONE = "done"
# Seconds between two reads of the store, at first and at most, and between two warnings about the wait.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.5
_WARNING_INTERVAL = 60.0


@contextmanager
def main_process_first(group: Group, is_first: bool, among: str = "all") -> Iterator[None]:
    """Run the body on the rank with `is_first`, then on all others.

    Collective: every rank must enter it.

    Args:
        group: The ranks.
        is_first: Whether this rank goes first; exactly one rank with the same `among` must.
        among: Names the ranks that wait for the same one, such as those of a machine.

    Raises:
        CollectiveError: On the other ranks, if the first one raised; it includes that rank's traceback.
    """
    if group.size == 1:
        yield
        return
    # Each rank counts its calls in the store, so that a number means the same call on every rank.
    board = group.open_board(f"turns/{among}")
    turn = board.count(f"by/{group.rank}")
    if not is_first:
        _wait_for_first(group, board, turn)
        yield
        return
    board.post(f"{turn}/who", str(group.rank))
    try:
        yield
    except BaseException as error:
        board.post(f"{turn}/end", f"{_headline(error)}\n{''.join(traceback.format_exception(error))}")
        raise
    board.post(f"{turn}/end", _DONE)


def _wait_for_first(group: Group, board: Board, turn: int) -> None:
    """Wait until the first rank has left the body; one of the waiting ranks warns now and then."""
    logs = board.count(f"{turn}/followers") == 1
    started = last_warning = time.monotonic()
    pause = _FIRST_PAUSE
    while (end := board.read(f"{turn}/end")) is None:
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
        if logs and time.monotonic() - last_warning >= _WARNING_INTERVAL:
            last_warning = time.monotonic()
            _warn_of_waiting(group.rank, board.read(f"{turn}/who"), last_warning - started)
    if end != _DONE:
        headline, _, report = end.partition("\n")
        raise CollectiveError(
            f"Rank {board.read(f'{turn}/who')} went first and failed: {headline}",
            "The other ranks depend on what it was to do",
            f"Its error was:\n{report}",
        )


def _warn_of_waiting(rank: int, first_rank: str | None, seconds: float) -> None:
    event = "the rank that goes first to arrive" if first_rank is None else f"rank {first_rank} to finish"
    _LOG.warning("[rank %d] waiting for %s, for %.0f s so far", rank, event, seconds)


def _headline(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip().replace("\n", " ")
