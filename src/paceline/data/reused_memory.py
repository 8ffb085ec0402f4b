"""Copies what a data set writes into the memory of an earlier batch: batches that are read ahead must not change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from paceline.collectives.nested import leaves, map_leaves

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ReusedMemory"]


class ReusedMemory:
    """Compares the first two batches of an iteration, and copies from then on what has the same memory in both.

    The first batch is copied before the second one is read, which may write over it.
    """

    def __init__(self) -> None:
        # As it was read: while it exists, nothing else can have its addresses.
        self._first: Any = None
        self._addresses: frozenset[int] | None = None

    def apart(self, batch: Any) -> Any:
        """Return the batch with its own memory where the data set uses its memory again."""
        if self._addresses is None and self._first is None:
            self._first = batch
            return map_leaves(_copy, batch)
        if self._addresses is None:
            self._addresses = frozenset(_addresses(self._first)) & frozenset(_addresses(batch))
            self._first = None
        reused = self._addresses
        if not reused:
            return batch
        return map_leaves(lambda leaf: _copy(leaf) if _address(leaf) in reused else leaf, batch)


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
