"""Counts and pads the samples of a batch before they are collated."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data._utils.pin_memory import pin_memory

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CountedBatch", "CountingCollate"]


class CountedBatch:
    """A collated batch and the number of its samples.

    Attributes:
        data: The batch.
        real: Samples without padding; 1 for a whole batch whose samples cannot be counted.
        rows: Samples including those that were repeated as padding.
    """

    __slots__ = ("data", "real", "rows")

    def __init__(self, data: Any, real: int, rows: int) -> None:
        self.data = data
        self.real = real
        self.rows = rows

    def __reduce__(self) -> tuple[type[CountedBatch], tuple[Any, int, int]]:
        return CountedBatch, (self.data, self.real, self.rows)

    def pin_memory(self) -> CountedBatch:
        """Pin the batch; torch calls this in its pinning thread."""
        self.data = pin_memory(self.data)  # type: ignore[no-untyped-call]
        return self


class CountingCollate:
    """A collate function that counts samples, and pads short batches on request.

    Args:
        collate: The user's collate function.
        batch_size: Samples in a whole batch; 0 if that varies, then nothing is padded.
        shared: Whether loader workers call it, in other processes.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], batch_size: int, *, shared: bool) -> None:
        self._collate = collate
        self._batch_size = batch_size
        self._pads = torch.zeros(1, dtype=torch.bool)
        if shared:
            # Persistent workers learn of a change only through shared memory.
            self._pads.share_memory_()  # type: ignore[no-untyped-call]

    def set_padding(self, enabled: bool) -> None:
        """Set whether short batches are padded from now on, by repeating their own samples."""
        self._pads[0] = enabled

    def __call__(self, samples: list[Any]) -> CountedBatch:
        """Collate samples, and the padding that completes them."""
        real = rows = len(samples)
        if real < self._batch_size and self._pads[0]:
            # Copied, because a collate function may modify its samples.
            samples = samples + [copy.deepcopy(samples[n % real]) for n in range(self._batch_size - real)]
            rows = self._batch_size
        return CountedBatch(self._collate(samples), real, rows)
