"""Copies what a data set writes into the memory of an earlier batch: batches that are read ahead must not change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from paceline.collectives.nested import leaves, map_leaves
from paceline.data.read_ahead import MAX_BYTES, num_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ReusedMemory"]


# Enough to see a ring of four buffers come round.
_WATCHED_BATCHES = 5


class ReusedMemory:
    """Compares the first batches of an iteration, and copies the following ones if one of these had another's memory.

    Until then each is copied before the next is read, which may write over it. Large batches are read one ahead, so
    only two of them are compared.
    """

    def __init__(self) -> None:
        # As they were read: while they exist, nothing else can have their addresses.
        self._watched: list[Any] = []
        self._reused: frozenset[int] | None = None

    def apart(self, batch: Any) -> Any:
        """Return the batch with its own memory where the data set uses its memory again."""
        if self._reused is None:
            self._watch(batch)
            return map_leaves(_copy, batch)
        reused = self._reused
        if not reused:
            return batch
        return map_leaves(lambda leaf: _copy(leaf) if _address(leaf) in reused else leaf, batch)

    def _watch(self, batch: Any) -> None:
        self._watched.append(batch)
        count = len(self._watched)
        if count < 2 or (count < _WATCHED_BATCHES and count * num_bytes(batch) < MAX_BYTES):
            return
        addresses = [set(_addresses(watched)) for watched in self._watched]
        everything = frozenset().union(*addresses)
        comes_again = sum(map(len, addresses)) > len(everything)
        # All of them: the last buffers of a ring may have been seen once.
        self._reused = everything if comes_again else frozenset()
        self._watched = []


def _addresses(batch: Any) -> Iterator[int]:
    for _, leaf in leaves(batch):
        address = _address(leaf)
        if address is not None:
            yield address


def _address(leaf: Any) -> int | None:
    """Where a tensor or an array begins; None for anything else."""
    if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided and leaf.numel():
        return leaf.data_ptr()
    if isinstance(leaf, np.ndarray) and leaf.size:
        return int(leaf.ctypes.data)
    return None


def _copy(leaf: Any) -> Any:
    if _address(leaf) is None:
        return leaf
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf.copy()
