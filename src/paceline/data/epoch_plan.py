"""Computes which samples are in which batch of which rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from paceline.collectives import BatchCounts
from paceline.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from paceline.data.sample_order import SampleOrder

__all__ = [
    "BatchListPlan",
    "EpochPlan",
    "Layout",
    "UniformBatchPlan",
    "check_not_empty",
    "indivisible",
    "within_batch",
]

# How many keys a rank takes out of the order of an epoch at a time.
KEYS_AT_A_TIME = 2048


@dataclass(slots=True, kw_only=True)
class Layout:
    """How each global batch is distributed over the ranks.

    Attributes:
        batch_size: Samples in one rank's batch.
        num_ranks: The number of ranks.
        even: Pad the last global batch with samples from the start, so that all ranks have the same number of batches
            of the same size. A single rank is never padded. May be changed between iterations.
        drop_last: Drop an incomplete global batch.
        fill: With `even`, pad the batch of a rank that has some samples of its own left. Otherwise it stays short, and
            only a rank that has no sample gets a batch of padding. May be changed between iterations.
    """

    batch_size: int
    num_ranks: int
    even: bool
    drop_last: bool
    fill: bool = True

    @property
    def global_batch_size(self) -> int:
        """Samples in one global batch."""
        return self.batch_size * self.num_ranks

    @property
    def padded(self) -> bool:
        """Whether an incomplete global batch is padded."""
        return self.even and self.num_ranks > 1 and not self.drop_last

    def num_global_batches(self, samples: int) -> int:
        """Return the number of global batches that `samples` samples make."""
        return samples // self.global_batch_size if self.drop_last else -(-samples // self.global_batch_size)

    def num_batches(self, samples: int, rank: int) -> int:
        """Return the number of batches that one rank gets of `samples` samples."""
        if self.drop_last or self.padded:
            return self.num_global_batches(samples)
        return max(0, -(-(samples - rank * self.batch_size) // self.global_batch_size))


class EpochPlan(ABC):
    """The batches from one position of an epoch to its end, for every rank, counted from 0.

    Attributes:
        num_global_batches: The number of global batches.
    """

    num_global_batches: int

    @abstractmethod
    def num_batches(self, rank: int) -> int:
        """Return the number of batches that a rank gets."""

    @abstractmethod
    def batch(self, index: int, rank: int) -> list[Any]:
        """Return the keys of one batch, without computing any other."""

    def batches(self, rank: int) -> Iterator[list[Any]]:
        """Yield the keys of a rank's batches, in order."""
        for index in range(self.num_batches(rank)):
            yield self.batch(index, rank)

    @abstractmethod
    def counts(self, index: int) -> BatchCounts:
        """Return the number of samples of each rank in global batch `index`."""

    @abstractmethod
    def samples_after(self, num_batches: int) -> int:
        """Return the position in the epoch's order after the first `num_batches` global batches."""


class UniformBatchPlan(EpochPlan):
    """Global batches of one size, cut from the epoch's order.

    Args:
        order: The order of the whole epoch.
        layout: How global batches are distributed.
        start: Position of the first sample that was not used yet.
    """

    def __init__(self, order: SampleOrder, layout: Layout, start: int = 0) -> None:
        self._order = order
        # Copied, so that changes do not affect this iteration.
        self._layout = replace(layout)
        self._start = start
        self._samples = len(order)
        self.num_global_batches = layout.num_global_batches(max(0, self._samples - start))

    def num_batches(self, rank: int) -> int:
        """See `EpochPlan.num_batches`."""
        return self._layout.num_batches(max(0, self._samples - self._start), rank)

    def batch(self, index: int, rank: int) -> list[Any]:
        """See `EpochPlan.batch`."""
        first = self._first(index, rank)
        stop = first + self._layout.batch_size
        if stop <= self._samples or not self._fills(first):
            return self._order.take(first, stop)
        keys = self._order.take(first, self._samples)
        for position in range(max(first, self._samples), stop):
            keys += self._order.take(position % self._samples, position % self._samples + 1)
        return keys

    def batches(self, rank: int) -> Iterator[list[Any]]:
        """See `EpochPlan.batches`; whole batches are cut many at a time."""
        size, step, number = self._layout.batch_size, self._layout.global_batch_size, self.num_batches(rank)
        first = self._first(0, rank)
        num_whole = min(number, max(0, (self._samples - first - size) // step + 1))
        at_a_time = max(1, KEYS_AT_A_TIME // size)
        for index in range(0, num_whole, at_a_time):
            yield from self._order.take_batches(first + index * step, size, step, min(at_a_time, num_whole - index))
        for index in range(num_whole, number):
            yield self.batch(index, rank)

    def counts(self, index: int) -> BatchCounts:
        """See `EpochPlan.counts`."""
        batch_size = self._layout.batch_size
        firsts = [self._first(index, rank) for rank in range(self._layout.num_ranks)]
        real = tuple(min(batch_size, max(0, self._samples - first)) for first in firsts)
        rows = tuple(batch_size if self._fills(first) else count for first, count in zip(firsts, real, strict=True))
        return BatchCounts(rows=rows, real=real)

    def samples_after(self, num_batches: int) -> int:
        """See `EpochPlan.samples_after`."""
        return min(self._start + num_batches * self._layout.global_batch_size, max(self._samples, self._start))

    def _fills(self, first: int) -> bool:
        """Say whether a batch that begins at position `first` is padded if samples run out."""
        return self._layout.padded and (self._layout.fill or first >= self._samples)

    def _first(self, index: int, rank: int) -> int:
        return self._start + index * self._layout.global_batch_size + rank * self._layout.batch_size


class BatchListPlan(EpochPlan):
    """Batches of different sizes, as a batch sampler made them.

    A global batch is one batch per rank, or one batch split into a part per rank (`split`). The last one is padded from
    the start of the epoch: with whole batches, or with samples of the first batch.

    Args:
        batches: The keys of all batches of the epoch.
        layout: How global batches are distributed; `batch_size` is not used.
        split: Whether the ranks share one batch.
        start: Position of the first sample that was not used yet; it must begin a batch.
        filling: The batches at the start of the epoch, if `batches` does not begin there.

    Raises:
        DataError: A batch before the last cannot be split evenly, or the position lies within one.
    """

    def __init__(
        self,
        batches: Sequence[list[Any]],
        layout: Layout,
        *,
        split: bool,
        start: int = 0,
        filling: Sequence[list[Any]] | None = None,
    ) -> None:
        self._batches = batches
        self._filling = batches if filling is None else filling
        # Copied, so that changes do not affect this iteration.
        self._layout = replace(layout)
        self._split = split
        self._ends = [0, *accumulate(map(len, batches))]
        self._skipped = min(bisect_left(self._ends, start), len(batches))
        if 0 < start < self._ends[self._skipped]:
            raise within_batch(start, self._ends[self._skipped])
        left = len(batches) - self._skipped
        self._step = 1 if split else layout.num_ranks
        if split:
            _check_divisible(batches[:-1], layout.num_ranks)
        self.num_global_batches = left // self._step if layout.drop_last else -(-left // self._step)

    def num_batches(self, rank: int) -> int:
        """See `EpochPlan.num_batches`."""
        if self.num_global_batches and not self.counts(self.num_global_batches - 1).rows[rank]:
            return self.num_global_batches - 1
        return self.num_global_batches

    def batch(self, index: int, rank: int) -> list[Any]:
        """See `EpochPlan.batch`."""
        if self._split:
            return self._part_of(self._batches[self._skipped + index], rank)
        number = self._skipped + index * self._step + rank
        if number < len(self._batches):
            return self._batches[number]
        if not self._layout.padded:
            return []
        return self._filling[(number - len(self._batches)) % len(self._filling)]

    def counts(self, index: int) -> BatchCounts:
        """See `EpochPlan.counts`."""
        ranks = range(self._layout.num_ranks)
        rows = tuple(len(self.batch(index, rank)) for rank in ranks)
        if self._split:
            whole = len(self._batches[self._skipped + index])
            share = -(-whole // self._layout.num_ranks)
            real = tuple(min(share, max(0, whole - rank * share)) for rank in ranks)
        else:
            first = self._skipped + index * self._step
            real = tuple(n if first + rank < len(self._batches) else 0 for rank, n in enumerate(rows))
        return BatchCounts(rows=rows, real=real)

    def samples_after(self, num_batches: int) -> int:
        """See `EpochPlan.samples_after`."""
        return self._ends[min(self._skipped + num_batches * self._step, len(self._batches))]

    def _part_of(self, batch: list[Any], rank: int) -> list[Any]:
        share = -(-len(batch) // self._layout.num_ranks)
        part = batch[rank * share : (rank + 1) * share]
        if self._layout.padded and len(part) < share and (self._layout.fill or not part):
            # Repeats a first batch that is shorter than what is missing.
            part = part + (self._filling[0] * share)[: share - len(part)]
        return part


def within_batch(start: int, end: int) -> DataError:
    """Return the error for a position within a batch: the batch sampler's batches have changed since it was saved."""
    return DataError(
        f"A loader's position lies after {start} samples of its epoch, and the batch sampler makes a batch that ends "
        f"after {end}",
        "The batches differ from those when the position was saved, and the samples in between would be left out",
        "Make the same batches again, or save at the end of an epoch",
    )


def check_not_empty(batches: Sequence[list[Any]], batch_sampler: object) -> None:
    """Raise `DataError` if a batch has no samples."""
    if all(batches):
        return
    raise DataError(
        f"The batch sampler {type(batch_sampler).__name__} yielded a batch without samples",
        "Nothing can be computed from it, and a rank that gets it would be taken for one that has reached its end",
        "Yield only batches that have samples",
    )


def _check_divisible(batches: Sequence[list[Any]], num_ranks: int) -> None:
    for number, batch in enumerate(batches):
        if len(batch) % num_ranks:
            raise indivisible(f"Batch {number}", len(batch), num_ranks)


def indivisible(batch: str, samples: int, num_ranks: int) -> DataError:
    """Return the error for a batch before the last that cannot be split evenly."""
    return DataError(
        f"{batch} of the batch sampler has {samples} samples for {num_ranks} ranks",
        "split_batches=True gives each rank an equal part of every batch",
        f"Make batches whose sizes are multiples of {num_ranks}, or use split_batches=False",
    )
