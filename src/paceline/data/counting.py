"""Counts samples, and completes a batch with whole ones, where they are still samples: before they are collated."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data._utils.pin_memory import pin_memory

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CountedBatch", "CountingCollate"]


class CountedBatch:
    """What a user's collate function made, and out of how many samples.

    Attributes:
        data: The batch.
        real: How many samples it was asked to hold; 1 for a whole batch that nobody can count.
        rows: How many it holds, with the ones that were repeated to complete it.
    """

    __slots__ = ("data", "real", "rows")

    def __init__(self, data: Any, real: int, rows: int) -> None:
        self.data = data
        self.real = real
        self.rows = rows

    def __reduce__(self) -> tuple[type[CountedBatch], tuple[Any, int, int]]:
        return CountedBatch, (self.data, self.real, self.rows)

    def pin_memory(self) -> CountedBatch:
        """Pin what can be pinned; torch calls this in its pinning thread."""
        self.data = pin_memory(self.data)  # type: ignore[no-untyped-call]
        return self


class CountingCollate:
    """The user's collate function for a reader whose batches are counted.

    Args:
        collate: The user's own.
        rows: Samples in a whole batch; 0 where that varies, then nothing is completed.
        shared: Workers call it, in processes of their own.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], rows: int, *, shared: bool) -> None:
        self._collate = collate
        self._rows = rows
        self._completes = torch.zeros(1, dtype=torch.bool)
        if shared:
            # Workers that live on learn only through shared memory what holds for the next pass.
            self._completes.share_memory_()  # type: ignore[no-untyped-call]

    def complete(self, wanted: bool) -> None:
        """Say whether a short batch is completed from now on, by samples of its own from the first."""
        self._completes[0] = wanted

    def __call__(self, samples: list[Any]) -> CountedBatch:
        """Collate some samples, and the ones that complete them."""
        real = rows = len(samples)
        if real < self._rows and self._completes[0]:
            # A collate function may change the samples that it is given, so the same one is not given twice.
            samples = samples + [copy.deepcopy(samples[n % real]) for n in range(self._rows - real)]
            rows = self._rows
        return CountedBatch(self._collate(samples), real, rows)
