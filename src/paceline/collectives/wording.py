"""How ranks are written out in messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.errors import named

if TYPE_CHECKING:
    from collections.abc import Sequence


def ranks_text(ranks: Sequence[int], *, are: bool = False, capital: bool = False) -> str:
    """Write `rank 2` or `ranks 0, 1, 3`, on request followed by `is` or `are`."""
    one = len(ranks) == 1
    text = f"{'rank' if one else 'ranks'} {named([str(rank) for rank in ranks])}"
    if are:
        text = f"{text} {'is' if one else 'are'}"
    return text.capitalize() if capital else text
