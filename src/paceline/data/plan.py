"""Which samples are in which batch of which rank, by arithmetic."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from paceline.collectives import BatchCounts
from paceline.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.data.order import Order

__all__ = ["BatchListPlan", "Layout", "Plan", "SamplePlan", "within_batch"]


@dataclass(slots=True, kw_only=True)
class Layout:
    """How each global batch is dealt out.

    Attributes:
        rows: Samples in one rank's batch.
        size: How many ranks there are.
        even: Complete the last global batch with samples from the start, so that all ranks have equally
            many batches of the same size. One rank alone is never completed. May be switched between passes.
        drop_last: Leave out a global batch that is not complete.
        fill: With `even`, complete the batch of a rank that has some samples of its own left. Else it stays short,
            and only a rank that has none is given a batch, to take part with. May be switched between passes.
    """

    rows: int
    size: int
    even: bool
    drop_last: bool
    fill: bool = True

    @property
    def global_rows(self) -> int:
        """Samples in one global batch."""
        return self.rows * self.size

    @property
    def padded(self) -> bool:
        """Whether an incomplete global batch is completed."""
        return self.even and self.size > 1 and not self.drop_last

    def rounds(self, samples: int) -> int:
        """Return how many global batches `samples` samples make."""
        return samples // self.global_rows if self.drop_last else -(-samples // self.global_rows)

    def num_batches(self, samples: int, rank: int) -> int:
        """Return how many batches one rank gets of `samples` samples."""
        if self.drop_last or self.padded:
            return self.rounds(samples)
        return max(0, -(-(samples - rank * self.rows) // self.global_rows))


class Plan(ABC):
    """The batches from one position of an epoch to its end, for every rank, counted from 0.

    Attributes:
        rounds: How many global batches there are.
    """

    rounds: int

    @abstractmethod
    def num_batches(self, rank: int) -> int:
        """Return how many batches a rank gets."""

    @abstractmethod
    def batch(self, index: int, rank: int) -> list[Any]:
        """Return the keys of one batch; no other batch is looked at."""

    @abstractmethod
    def counts(self, index: int) -> BatchCounts:
        """Return how many samples each rank has in global batch `index`."""

    @abstractmethod
    def samples_after(self, rounds: int) -> int:
        """Return the position in the epoch's order after that many global batches."""


class SamplePlan(Plan):
    """Global batches of one size, cut from the epoch's order.

    Args:
        order: Of the whole epoch.
        layout: How a global batch is dealt out.
        start: Position of the first sample that is still to be used.
    """

    def __init__(self, order: Order, layout: Layout, start: int = 0) -> None:
        self._order = order
        # A pass goes on as it began.
        self._layout = replace(layout)
        self._start = start
        self._samples = len(order)
        self.rounds = layout.rounds(max(0, self._samples - start))

    def num_batches(self, rank: int) -> int:
        """See `Plan.num_batches`."""
        return self._layout.num_batches(max(0, self._samples - self._start), rank)

    def batch(self, index: int, rank: int) -> list[Any]:
        """See `Plan.batch`."""
        first = self._first(index, rank)
        stop = first + self._layout.rows
        if stop <= self._samples or not self._fills(first):
            return self._order.take(first, stop)
        keys = self._order.take(first, self._samples)
        for position in range(max(first, self._samples), stop):
            keys += self._order.take(position % self._samples, position % self._samples + 1)
        return keys

    def counts(self, index: int) -> BatchCounts:
        """See `Plan.counts`."""
        most = self._layout.rows
        firsts = [self._first(index, rank) for rank in range(self._layout.size)]
        real = tuple(min(most, max(0, self._samples - first)) for first in firsts)
        rows = tuple(most if self._fills(first) else count for first, count in zip(firsts, real, strict=True))
        return BatchCounts(rows=rows, real=real)

    def samples_after(self, rounds: int) -> int:
        """See `Plan.samples_after`."""
        return min(self._start + rounds * self._layout.global_rows, max(self._samples, self._start))

    def _fills(self, first: int) -> bool:
        """Say whether a batch that begins at a position is completed where samples run out."""
        return self._layout.padded and (self._layout.fill or first >= self._samples)

    def _first(self, index: int, rank: int) -> int:
        return self._start + index * self._layout.global_rows + rank * self._layout.rows


class BatchListPlan(Plan):
    """Batches of different sizes, as a batch sampler made them.

    Each round deals out one batch per rank, or cuts one batch into a piece per rank (`split`). What is
    missing in the last round is taken from the start: whole batches, or samples of the first batch. Those are
    padding.

    Args:
        batches: The keys of all batches of the epoch.
        layout: `rows` is not used.
        split: Whether the ranks share one batch.
        start: Position of the first sample that is still to be used, which begins a batch.

    Raises:
        DataError: A batch before the last cannot be split evenly, or the position lies within one.
    """

    def __init__(self, batches: Sequence[list[Any]], layout: Layout, *, split: bool, start: int = 0) -> None:
        self._batches = batches
        # A pass goes on as it began.
        self._layout = replace(layout)
        self._split = split
        self._ends = [0, *accumulate(map(len, batches))]
        self._skipped = min(bisect_left(self._ends, start), len(batches))
        if 0 < start < self._ends[self._skipped]:
            raise within_batch(start, self._ends[self._skipped])
        left = len(batches) - self._skipped
        self._step = 1 if split else layout.size
        if split:
            _check_divisible(batches[:-1], layout.size)
        self.rounds = left // self._step if layout.drop_last else -(-left // self._step)

    def num_batches(self, rank: int) -> int:
        """See `Plan.num_batches`."""
        if self.rounds and not self.counts(self.rounds - 1).rows[rank]:
            return self.rounds - 1
        return self.rounds

    def batch(self, index: int, rank: int) -> list[Any]:
        """See `Plan.batch`."""
        if self._split:
            return self._piece(self._batches[self._skipped + index], rank)
        number = self._skipped + index * self._step + rank
        if number < len(self._batches):
            return self._batches[number]
        return self._batches[number % len(self._batches)] if self._layout.padded else []

    def counts(self, index: int) -> BatchCounts:
        """See `Plan.counts`."""
        ranks = range(self._layout.size)
        rows = tuple(len(self.batch(index, rank)) for rank in ranks)
        if self._split:
            whole = len(self._batches[self._skipped + index])
            share = -(-whole // self._layout.size)
            real = tuple(min(share, max(0, whole - rank * share)) for rank in ranks)
        else:
            first = self._skipped + index * self._step
            real = tuple(n if first + rank < len(self._batches) else 0 for rank, n in enumerate(rows))
        return BatchCounts(rows=rows, real=real)

    def samples_after(self, rounds: int) -> int:
        """See `Plan.samples_after`."""
        return self._ends[min(self._skipped + rounds * self._step, len(self._batches))]

    def _piece(self, batch: list[Any], rank: int) -> list[Any]:
        share = -(-len(batch) // self._layout.size)
        piece = batch[rank * share : (rank + 1) * share]
        if self._layout.padded and len(piece) < share and (self._layout.fill or not piece):
            filling = self._batches[0]
            # Cycles a first batch that is shorter than what is missing.
            piece = piece + (filling * share)[: share - len(piece)]
        return piece


def within_batch(start: int, end: int) -> DataError:
    """The error of a position within a batch: the batch sampler makes other batches than when it was saved."""
    return DataError(
        f"A loader's position lies after {start} samples of its epoch, and the batch sampler makes a batch that ends "
        f"after {end}",
        "It makes other batches than when the position was saved, and the samples between would be left out",
        "Make the same batches, or save at the end of an epoch",
    )


def _check_divisible(batches: Sequence[list[Any]], size: int) -> None:
    for number, batch in enumerate(batches):
        if len(batch) % size:
            raise DataError(
                f"Batch {number} of the batch sampler has {len(batch)} samples for {size} ranks",
                "split_batches=True gives each rank an equal part of every batch",
                f"Make batches whose sizes are multiples of {size}, or use split_batches=False",
            )
