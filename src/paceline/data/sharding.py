"""Distributes the samples of a map-style data set, as its samplers order them, over the ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Sampler

from paceline.collectives import BatchCounts
from paceline.data.epoch_plan import (
    BatchListPlan,
    EpochPlan,
    Layout,
    UniformBatchPlan,
    check_not_empty,
    indivisible,
    within_batch,
)
from paceline.data.iteration_progress import IterationProgress, PlannedProgress, RecordedBatch, RecordedProgress
from paceline.data.randomness import IsolatedRng, mix_seed
from paceline.data.sample_order import (
    ListOrder,
    TensorOrder,
    maybe_length,
    run_sampler_on_rank_0,
    sampler_chain,
    sampler_generators,
    set_sampler_epoch,
)
from paceline.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from paceline.collectives import Group
    from paceline.data.sample_order import OrderSource

__all__ = [
    "BatchSharding",
    "MergedRanksSharding",
    "PlannedSharding",
    "SampleSharding",
    "ShardedBatchSampler",
    "Sharding",
    "UnsizedSharding",
]

# Batches per rank that rank 0 draws and sends at a time if a sampler has no length.
CHUNK = 16


class Sharding(ABC):
    """Distributes the samples of each epoch.

    Attributes:
        total_batch_size: Samples of one global batch, None if it varies.
        splits: Whether all ranks share each batch of the batch sampler.
        planned_batch_size: Samples in one rank's batch according to the last plan; 0 if it varies.
    """

    total_batch_size: int | None
    splits = False
    planned_batch_size = 0

    @abstractmethod
    def begin(self, seed: int, epoch: int, samples: int) -> tuple[Iterable[Any], IterationProgress] | None:
        """Return this rank's batches of keys from a position on, and their progress.

        None if no global batch is left. Collective: every rank must call it.
        """

    @abstractmethod
    def num_batches(self) -> int:
        """Return the number of this rank's batches in a whole epoch; raise TypeError if unknown."""

    @abstractmethod
    def num_global_batches(self) -> int | None:
        """Return the number of global batches in a whole epoch, None if unknown."""

    @abstractmethod
    def size(self) -> int | None:
        """Return the number of samples in an epoch, None if unknown."""

    def num_repeated(self) -> int:
        """Return how many samples are read twice in an epoch, as far as that is known beforehand."""
        return 0

    @abstractmethod
    def describe(self, seed: int) -> str:
        """Describe in a few words where the order comes from."""


class PlannedSharding(Sharding):
    """A sharding that knows all batches of an epoch beforehand."""

    def __init__(self, group: Group) -> None:
        self._group = group

    @abstractmethod
    def plan(self, seed: int, epoch: int, samples: int) -> EpochPlan:
        """Return the batches of an epoch from a position on. Collective: every rank must call it."""

    def begin(self, seed: int, epoch: int, samples: int) -> tuple[Iterable[Any], IterationProgress] | None:
        """See `Sharding.begin`."""
        plan = self.plan(seed, epoch, samples)
        if not plan.num_global_batches:
            return None
        rank = self._group.rank
        return plan.batches(rank), PlannedProgress(plan, rank)

    def samples_before(self, seed: int, epoch: int, num_batches: int) -> int:
        """Return the position in an epoch after its first `num_batches` global batches.

        Collective: every rank must call it.
        """
        return self.plan(seed, epoch, 0).samples_after(num_batches)

    def num_batches(self) -> int:
        """See `Sharding.num_batches`."""
        return self.num_batches_of(self._group.rank)

    @abstractmethod
    def num_batches_of(self, rank: int) -> int:
        """Return the number of a rank's batches in a whole epoch."""


class SampleSharding(PlannedSharding):
    """Global batches of one size, cut from an order of samples."""

    def __init__(self, source: OrderSource, layout: Layout, group: Group) -> None:
        super().__init__(group)
        self._source = source
        self.layout = layout
        self.total_batch_size = layout.global_batch_size

    def plan(self, seed: int, epoch: int, samples: int) -> EpochPlan:
        """See `PlannedSharding.plan`."""
        return UniformBatchPlan(self._source.of_epoch(seed, epoch), self.layout, samples)

    def samples_before(self, seed: int, epoch: int, num_batches: int) -> int:
        """See `PlannedSharding.samples_before`; no sampler runs for that."""
        return num_batches * self.layout.global_batch_size

    def num_batches_of(self, rank: int) -> int:
        """See `PlannedSharding.num_batches_of`."""
        return self.layout.num_batches(self._source.size(), rank)

    def num_global_batches(self) -> int | None:
        """See `Sharding.num_global_batches`."""
        return self.layout.num_global_batches(self._source.size())

    def size(self) -> int | None:
        """See `Sharding.size`."""
        return self._source.size()

    def num_repeated(self) -> int:
        """See `Sharding.num_repeated`."""
        size = self._source.size()
        if not (self.layout.padded and self.layout.fill):
            return 0
        return self.layout.num_global_batches(size) * self.layout.global_batch_size - size

    def describe(self, seed: int) -> str:
        """See `Sharding.describe`."""
        return self._source.describe(seed)


class BatchSharding(PlannedSharding):
    """The batches of a batch sampler, which rank 0 runs once per epoch.

    Batches of one size (the last may be shorter) are distributed sample by sample; batches of different sizes are
    distributed whole.
    """

    def __init__(self, batch_sampler: Any, layout: Layout, group: Group, *, split: bool) -> None:
        super().__init__(group)
        self._batch_sampler = batch_sampler
        self._layout = layout
        self._split = self.splits = split
        self.total_batch_size = _total_batch_size(batch_sampler, layout, split=split)

    def plan(self, seed: int, epoch: int, samples: int) -> EpochPlan:
        """See `PlannedSharding.plan`."""
        batches = [list(batch) for batch in run_sampler_on_rank_0(self._batch_sampler, self._group, seed, epoch)]
        check_not_empty(batches, self._batch_sampler)
        layout = self._uniform_layout(batches)
        self.planned_batch_size = 0 if layout is None else layout.batch_size
        if layout is None:
            return BatchListPlan(batches, self._layout, split=self._split, start=samples)
        keys = list(chain.from_iterable(batches))
        are_integers = all(type(key) is int for key in keys)
        order = TensorOrder(torch.tensor(keys)) if are_integers else ListOrder(keys)
        return UniformBatchPlan(order, layout, samples)

    def _uniform_layout(self, batches: list[list[Any]]) -> Layout | None:
        """Return the layout of batches of one size, or None if their sizes differ."""
        sizes = [len(batch) for batch in batches]
        if not sizes or set(sizes[:-1]) - {sizes[0]} or not 0 < sizes[-1] <= sizes[0]:
            return None
        batch_size = split_batch_size(sizes[0], self._layout.num_ranks) if self._split else sizes[0]
        return replace(self._layout, batch_size=batch_size)

    def num_batches_of(self, rank: int) -> int:
        """See `PlannedSharding.num_batches_of`."""
        return self._as_samples().num_batches(len(self._batch_sampler), 0 if self._split else rank)

    def num_global_batches(self) -> int | None:
        """See `Sharding.num_global_batches`."""
        return self._as_samples().num_global_batches(len(self._batch_sampler))

    def _as_samples(self) -> Layout:
        """Return the layout in which one batch counts as one sample."""
        num_ranks = 1 if self._split else self._layout.num_ranks
        return replace(self._layout, batch_size=1, num_ranks=num_ranks)

    def size(self) -> int | None:
        """See `Sharding.size`; the length of an inner sampler, if there is one."""
        inner_samplers = list(sampler_chain(self._batch_sampler))[1:]
        lengths = map(maybe_length, inner_samplers)
        return next((length for length in lengths if length), None)

    def describe(self, seed: int) -> str:
        """See `Sharding.describe`."""
        return f"batched by {type(self._batch_sampler).__name__} under (seed {seed}, epoch)"


class _MergedRanksPlan(EpochPlan):
    """The batches of all ranks of another plan, concatenated in rank order."""

    def __init__(self, plan: EpochPlan, layout: Layout) -> None:
        self._plan = plan
        self._layout = layout
        self.num_global_batches = plan.num_global_batches

    def num_batches(self, rank: int) -> int:
        """See `EpochPlan.num_batches`."""
        return self.num_global_batches

    def batch(self, index: int, rank: int) -> list[Any]:
        """See `EpochPlan.batch`."""
        ranks = [rank for rank in range(self._layout.num_ranks) if index < self._plan.num_batches(rank)]
        if not self._layout.fill:
            # A batch that is all padding is not needed here.
            ranks = [rank for rank in ranks if self._plan.counts(index).real[rank]]
        return list(chain.from_iterable(self._plan.batch(index, rank) for rank in ranks))

    def counts(self, index: int) -> BatchCounts:
        """See `EpochPlan.counts`."""
        counts = self._plan.counts(index)
        real = sum(counts.real)
        return BatchCounts(rows=(sum(counts.rows) if self._layout.fill else real,), real=(real,))

    def samples_after(self, num_batches: int) -> int:
        """See `EpochPlan.samples_after`."""
        return self._plan.samples_after(num_batches)


class MergedRanksSharding(PlannedSharding):
    """Gives one rank everything that several ranks would get.

    Args:
        inner: Distributes the samples over those ranks.
        layout: The layout of `inner`.
        group: This process only.
    """

    def __init__(self, inner: PlannedSharding, layout: Layout, group: Group) -> None:
        super().__init__(group)
        self._inner = inner
        self._layout = layout
        self.total_batch_size = inner.total_batch_size
        self.splits = inner.splits

    def plan(self, seed: int, epoch: int, samples: int) -> EpochPlan:
        """See `PlannedSharding.plan`."""
        plan = self._inner.plan(seed, epoch, samples)
        self.planned_batch_size = self._inner.planned_batch_size * self._layout.num_ranks
        return _MergedRanksPlan(plan, self._layout)

    def num_batches_of(self, rank: int) -> int:
        """See `PlannedSharding.num_batches_of`."""
        return self._inner.num_global_batches() or 0

    def num_global_batches(self) -> int | None:
        """See `Sharding.num_global_batches`."""
        return self._inner.num_global_batches()

    def size(self) -> int | None:
        """See `Sharding.size`."""
        return self._inner.size()

    def describe(self, seed: int) -> str:
        """See `Sharding.describe`."""
        return f"{self._inner.describe(seed)}, the batches of {self._layout.num_ranks} ranks merged into one"


class UnsizedSharding(Sharding):
    """The batches of a batch sampler without a length, which may never end.

    Rank 0 runs it some global batches ahead and sends the others the keys. A position is reached by running it.
    """

    def __init__(self, batch_sampler: Any, layout: Layout, group: Group, *, split: bool) -> None:
        self._batch_sampler = batch_sampler
        self._layout = layout
        self._group = group
        self._split = self.splits = split
        self.total_batch_size = _total_batch_size(batch_sampler, layout, split=split)

    def begin(self, seed: int, epoch: int, samples: int) -> tuple[Iterable[Any], IterationProgress] | None:
        """See `Sharding.begin`."""
        set_sampler_epoch(self._batch_sampler, epoch)
        batches = self._all_batches(seed, epoch)
        skipped = self._skip(batches, samples)
        global_batches = self._global_batches(batches)
        current = next(global_batches, None)
        if current is None:
            return None
        progress = RecordedProgress(samples)
        # Padding is taken from the start of the epoch, wherever the iteration begins.
        filling = skipped or current
        return self._batches(chain([current], global_batches), filling, progress, samples), progress

    @property
    def _batches_each(self) -> int:
        """The number of batches in a global batch."""
        return 1 if self._split else self._layout.num_ranks

    def _batches(
        self,
        global_batches: Iterator[list[list[Any]]],
        filling: list[list[Any]],
        progress: RecordedProgress,
        samples: int,
    ) -> Iterator[list[Any]]:
        rank = self._group.rank
        current = next(global_batches)
        plan = BatchListPlan(current, self._layout, split=self._split, filling=filling)
        while plan.num_batches(rank):
            following = next(global_batches, [])
            if following and self._split and len(current[0]) % self._layout.num_ranks:
                raise indivisible("A batch", len(current[0]), self._layout.num_ranks)
            samples += sum(map(len, current))
            next_plan = BatchListPlan(following, self._layout, split=self._split, filling=filling)
            progress.record(RecordedBatch(plan.counts(0), samples, not next_plan.num_batches(rank), not following))
            yield plan.batch(0, rank)
            current, plan = following, next_plan

    def _skip(self, batches: Iterator[list[Any]], samples: int) -> list[list[Any]]:
        """Skip the batches of the first `samples` samples; return those of the first global batch."""
        first: list[list[Any]] = []
        left = samples
        while left > 0 and (batch := next(batches, None)) is not None:
            left -= len(batch)
            if len(first) < self._batches_each:
                first.append(batch)
        if left < 0:
            raise within_batch(samples, samples - left)
        return first

    def _global_batches(self, batches: Iterator[list[Any]]) -> Iterator[list[list[Any]]]:
        """Yield the batches of each global batch; the last may have fewer batches than there are ranks."""
        while current := list(islice(batches, self._batches_each)):
            if len(current) < self._batches_each and self._layout.drop_last:
                return
            yield current

    def _all_batches(self, seed: int, epoch: int) -> Iterator[list[Any]]:
        chunk_size = CHUNK * (1 if self._split else self._layout.num_ranks)
        isolated_rng = IsolatedRng(mix_seed(seed, epoch), sampler_generators(self._batch_sampler))
        batches: Iterator[Any] = iter(())
        with isolated_rng():
            if self._group.rank == 0:
                batches = iter(self._batch_sampler)
        while True:
            with isolated_rng():
                chunk = [list(batch) for batch in islice(batches, chunk_size)]
            chunk = self._group.broadcast_object(chunk)
            check_not_empty(chunk, self._batch_sampler)
            yield from chunk
            if len(chunk) < chunk_size:
                return

    def num_batches(self) -> int:
        """Raise TypeError, as `len` of a loader without a length does."""
        raise TypeError(f"the batch sampler {type(self._batch_sampler).__name__} has no length")

    def num_global_batches(self) -> int | None:
        """See `Sharding.num_global_batches`."""
        return None

    def size(self) -> int | None:
        """See `Sharding.size`."""
        return None

    def describe(self, seed: int) -> str:
        """See `Sharding.describe`."""
        return f"batched by {type(self._batch_sampler).__name__} under (seed {seed}, epoch), no length"


def _total_batch_size(batch_sampler: Any, layout: Layout, *, split: bool) -> int | None:
    """Return the samples of a global batch, None if the batch sampler does not have a fixed `batch_size`."""
    batch_size = getattr(batch_sampler, "batch_size", None)
    if not isinstance(batch_size, int):
        return None
    return batch_size if split else batch_size * layout.num_ranks


def split_batch_size(batch_size: int, num_ranks: int) -> int:
    """Return the size of a rank's part of a shared batch; raise `DataError` if the batch cannot be split evenly."""
    if batch_size % num_ranks:
        raise DataError(
            f"A batch of {batch_size} samples cannot be split evenly over {num_ranks} ranks",
            "split_batches=True gives each rank an equal part of every batch",
            f"Choose a batch size that is a multiple of {num_ranks}, or use split_batches=False",
        )
    return batch_size // num_ranks


class ShardedBatchSampler(Sampler[Any]):
    """Yields this rank's batches of keys for the iteration that the loader has begun.

    Args:
        sharding: Distributes the samples.
        batch_sampler: The user's own batch sampler (or sampler, for a loader with batch_size=None).
        single: Yield the one key of each batch instead of a list, for a loader with batch_size=None.
    """

    def __init__(self, sharding: Sharding, batch_sampler: Any, *, single: bool = False) -> None:
        self.sharding = sharding
        self.batch_sampler = batch_sampler
        self._single = single
        self._batches: Iterable[Any] = ()

    def set_batches(self, batches: Iterable[Any]) -> None:
        """Make the next iteration yield these batches."""
        self._batches = (batch[0] for batch in batches) if self._single else batches

    def __iter__(self) -> Iterator[Any]:
        # Always over the same iterable: with workers, torch calls this twice before it takes the first batch.
        return iter(self._batches)

    def __len__(self) -> int:
        return self.sharding.num_batches()
