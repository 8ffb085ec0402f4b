"""Lengths of loaders that are not prepared yet, in a run on one process that plays several ranks."""

from __future__ import annotations

import functools
import math
import sys
import weakref
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["merge_lengths"]

_LIBRARIES = ("paceline", "torch")


def merge_lengths(ranks: int) -> None:
    """Make `len(loader)` of a loader that is not prepared count the batches of all ranks as one.

    That is its length with the batch size that this process gets. A schedule of the script that is made from it has
    another length than on several processes, where the loader counts the batches of all ranks. A loader that the
    script itself iterates over is not going to be prepared, and keeps its length. This holds for the rest of the
    process.

    Args:
        ranks: How many ranks' batches this process gets as one.
    """
    length, iterate = DataLoader.__len__, DataLoader.__iter__
    read: weakref.WeakSet[DataLoader[Any]] = weakref.WeakSet()

    @functools.wraps(length)
    def merged(self: DataLoader[Any]) -> int:
        count = length(self)
        if self in read or _is_of_library(sys._getframe(1).f_globals):
            return count
        return count // ranks if self.drop_last else math.ceil(count / ranks)

    @functools.wraps(iterate)
    def noted(self: DataLoader[Any]) -> Iterator[Any]:
        read.add(self)
        return iterate(self)

    DataLoader.__len__ = merged  # type: ignore[method-assign]
    DataLoader.__iter__ = noted  # type: ignore[method-assign,assignment]


def _is_of_library(names: dict[str, Any]) -> bool:
    return str(names.get("__name__")).partition(".")[0] in _LIBRARIES
