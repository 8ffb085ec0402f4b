"""How the samplers of a loader over a map-style data set are dealt out to ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Sampler

from paceline.data.order import (
    ListedOrder,
    TensorOrder,
    draw_together,
    own_generators,
    reach_epoch,
    sampler_chain,
    size_of,
)
from paceline.data.plan import BatchListPlan, Layout, Plan, SamplePlan, within_batch
from paceline.data.progress import PlannedProgress, Progress, RecordedProgress, Round, known
from paceline.data.randomness import PrivateRandomness, mix_seed
from paceline.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from paceline.collectives import Group
    from paceline.data.order import OrderSource
    from paceline.data.plan import Layout

__all__ = [
    "BatchSharding",
    "PlannedSharding",
    "SampleSharding",
    "ShardedBatchSampler",
    "Sharding",
    "UnsizedSharding",
]

# Batches per rank that rank 0 draws and sends at a time, where a sampler has no length.
CHUNK = 16


class Sharding(ABC):
    """Deals out the samples of each epoch.

    Attributes:
        total_batch_size: Samples of one global batch, None where it varies.
        splits: Whether all ranks share each batch of the batch sampler.
        planned_rows: Samples in one rank's batch as the last plan found them; 0 where they vary.
    """

    total_batch_size: int | None
    splits = False
    planned_rows = 0

    @abstractmethod
    def begin(self, seed: int, epoch: int, samples: int) -> tuple[Iterable[Any], Progress] | None:
        """Return this rank's batches of keys from a position on, and the progress through them.

        None if no global batch is left there. Collective: every rank must call it.
        """

    @abstractmethod
    def num_batches(self) -> int:
        """Return this rank's batches in a whole epoch; TypeError where that is not known."""

    @abstractmethod
    def num_rounds(self) -> int | None:
        """Return the global batches in a whole epoch, None where that is not known."""

    @abstractmethod
    def size(self) -> int | None:
        """Return the samples of an epoch, None where that is not known."""

    @abstractmethod
    def describe(self, seed: int) -> str:
        """Say in a few words where the order comes from."""


class PlannedSharding(Sharding):
    """A sharding whose epochs can be planned."""

    def __init__(self, group: Group) -> None:
        self._group = group

    @abstractmethod
    def plan(self, seed: int, epoch: int, samples: int) -> Plan:
        """Lay out an epoch from a position on. Collective: every rank must call it."""

    def begin(self, seed: int, epoch: int, samples: int) -> tuple[Iterable[Any], Progress] | None:
        """See `Sharding.begin`."""
        plan = self.plan(seed, epoch, samples)
        if not plan.rounds:
            return None
        rank = self._group.rank
        return _batches_of(plan, rank), PlannedProgress(plan, rank)

    def num_batches(self) -> int:
        """See `Sharding.num_batches`."""
        return self.num_batches_of(self._group.rank)

    @abstractmethod
    def num_batches_of(self, rank: int) -> int:
        """Return a rank's batches in a whole epoch."""


def _batches_of(plan: Plan, rank: int) -> Iterator[list[Any]]:
    for index in range(plan.num_batches(rank)):
        yield plan.batch(index, rank)


class SampleSharding(PlannedSharding):
    """Global batches of one size out of an order of samples."""

    def __init__(self, source: OrderSource, layout: Layout, group: Group) -> None:
        super().__init__(group)
        self._source = source
        self.layout = layout
        self.total_batch_size = layout.global_rows

    def plan(self, seed: int, epoch: int, samples: int) -> Plan:
        """See `PlannedSharding.plan`."""
        return SamplePlan(self._source.of_epoch(seed, epoch), self.layout, samples)

    def num_batches_of(self, rank: int) -> int:
        """See `PlannedSharding.num_batches_of`."""
        return self.layout.num_batches(self._source.size(), rank)

    def num_rounds(self) -> int | None:
        """See `Sharding.num_rounds`."""
        return self.layout.rounds(self._source.size())

    def size(self) -> int | None:
        """See `Sharding.size`."""
        return self._source.size()

    def describe(self, seed: int) -> str:
        """See `Sharding.describe`."""
        return self._source.describe(seed)


class BatchSharding(PlannedSharding):
    """The batches that a batch sampler makes; rank 0 runs it once an epoch.

    Batches of one size (the last may be shorter) are dealt out sample by sample like any others; batches of
    different sizes are dealt out whole.
    """

    def __init__(self, batch_sampler: Any, layout: Layout, group: Group, *, split: bool) -> None:
        super().__init__(group)
        self._batch_sampler = batch_sampler
        self._layout = layout
        self._split = self.splits = split
        rows = getattr(batch_sampler, "batch_size", None)
        self.total_batch_size = None if not isinstance(rows, int) else rows * (1 if split else layout.size)

    def plan(self, seed: int, epoch: int, samples: int) -> Plan:
        """See `PlannedSharding.plan`."""
        batches = [list(batch) for batch in draw_together(self._batch_sampler, self._group, seed, epoch)]
        layout = self._uniform(batches)
        self.planned_rows = 0 if layout is None else layout.rows
        if layout is None:
            return BatchListPlan(batches, self._layout, split=self._split, start=samples)
        keys = list(chain.from_iterable(batches))
        whole = all(type(key) is int for key in keys)
        return SamplePlan(TensorOrder(torch.tensor(keys)) if whole else ListedOrder(keys), layout, samples)

    def _uniform(self, batches: list[list[Any]]) -> Layout | None:
        rows = len(batches[0]) if batches else 0
        if not rows or any(len(batch) != rows for batch in batches[:-1]) or not 0 < len(batches[-1]) <= rows:
            return None
        if self._split:
            rows = split_rows(rows, self._layout.size)
        return replace(self._layout, rows=rows)

    def num_batches_of(self, rank: int) -> int:
        """See `PlannedSharding.num_batches_of`."""
        return self._as_samples().num_batches(len(self._batch_sampler), 0 if self._split else rank)

    def num_rounds(self) -> int | None:
        """See `Sharding.num_rounds`."""
        return self._as_samples().rounds(len(self._batch_sampler))

    def _as_samples(self) -> Layout:
        """Return the layout in which one batch counts as one sample."""
        size = 1 if self._split else self._layout.size
        return replace(self._layout, rows=1, size=size)

    def size(self) -> int | None:
        """See `Sharding.size`; the length of an inner sampler, where there is one."""
        return next(
            (n for s in sampler_chain(self._batch_sampler) if s is not self._batch_sampler and (n := size_of(s))),
            None,
        )

    def describe(self, seed: int) -> str:
        """See `Sharding.describe`."""
        return f"batched by {type(self._batch_sampler).__name__} under (seed {seed}, epoch)"


class UnsizedSharding(Sharding):
    """The batches of a batch sampler that does not know its length; it may never end.

    Rank 0 runs it a few rounds ahead and sends the others the keys. A position is reached by running it.
    """

    def __init__(self, batch_sampler: Any, layout: Layout, group: Group, *, split: bool) -> None:
        self._batch_sampler = batch_sampler
        self._layout = layout
        self._group = group
        self._split = self.splits = split
        rows = getattr(batch_sampler, "batch_size", None)
        self.total_batch_size = None if not isinstance(rows, int) else rows * (1 if split else layout.size)

    def begin(self, seed: int, epoch: int, samples: int) -> tuple[Iterable[Any], Progress] | None:
        """See `Sharding.begin`."""
        reach_epoch(self._batch_sampler, epoch)
        rounds = self._rounds(seed, epoch, samples)
        first = next(rounds, None)
        if first is None:
            return None
        progress = RecordedProgress(samples)
        return self._batches(chain([first], rounds), progress, samples), progress

    def _batches(
        self, rounds: Iterable[list[list[Any]]], progress: RecordedProgress, samples: int
    ) -> Iterator[list[Any]]:
        rounds = iter(rounds)
        current = opening = next(rounds)
        skipped = sum(map(len, opening))
        while current:
            following = next(rounds, [])
            plan = BatchListPlan([*opening, *current], self._layout, split=self._split, start=skipped)
            samples += sum(map(len, current))
            if not plan.num_batches(self._group.rank):
                return
            last = not following or (not self._layout.padded and self._lacks(following))
            progress.record(Round(plan.counts(0), samples, known(last), known(not following)))
            yield plan.batch(0, self._group.rank)
            current = following

    def _lacks(self, batches: list[list[Any]]) -> bool:
        return not self._split and len(batches) <= self._group.rank

    def _rounds(self, seed: int, epoch: int, samples: int) -> Iterator[list[list[Any]]]:
        """Yield the batches of each round, the last perhaps fewer than there are ranks."""
        per_round = 1 if self._split else self._layout.size
        batches = self._all_batches(seed, epoch)
        left = samples
        while left > 0:
            left -= len(next(batches, [None] * left))
        if left < 0:
            raise within_batch(samples, samples - left)
        while current := list(islice(batches, per_round)):
            if len(current) < per_round and self._layout.drop_last:
                return
            yield current

    def _all_batches(self, seed: int, epoch: int) -> Iterator[list[Any]]:
        wanted = CHUNK * (1 if self._split else self._layout.size)
        randomness = PrivateRandomness(mix_seed(seed, epoch), own_generators(self._batch_sampler))
        batches: Iterator[Any] = iter(())
        with randomness():
            if self._group.rank == 0:
                batches = iter(self._batch_sampler)
        while True:
            with randomness():
                chunk = [list(batch) for batch in islice(batches, wanted)]
            chunk = self._group.broadcast_object(chunk)
            yield from chunk
            if len(chunk) < wanted:
                return

    def num_batches(self) -> int:
        """Raise TypeError, as `len` of a loader without a length does."""
        raise TypeError(f"the batch sampler {type(self._batch_sampler).__name__} has no length")

    def num_rounds(self) -> int | None:
        """See `Sharding.num_rounds`."""
        return None

    def size(self) -> int | None:
        """See `Sharding.size`."""
        return None

    def describe(self, seed: int) -> str:
        """See `Sharding.describe`."""
        return f"batched by {type(self._batch_sampler).__name__} under (seed {seed}, epoch), no length"


def split_rows(rows: int, size: int) -> int:
    """Return a rank's part of a batch that all ranks share; raise `DataError` if it is not whole."""
    if rows % size:
        raise DataError(
            f"A batch of {rows} samples is to be split over {size} ranks",
            "split_batches=True gives each rank an equal part of every batch",
            f"Choose a batch size that is a multiple of {size}, or use split_batches=False",
        )
    return rows // size


class ShardedBatchSampler(Sampler[Any]):
    """Yields this rank's batches of keys for the pass that the loader has begun.

    Args:
        sharding: Deals out the samples.
        batch_sampler: The user's own batch sampler (or sampler, for a loader without batches).
        single: Yield the one key of each batch instead of a list, for a loader without batches.
    """

    def __init__(self, sharding: Sharding, batch_sampler: Any, *, single: bool = False) -> None:
        self.sharding = sharding
        self.batch_sampler = batch_sampler
        self._single = single
        self._batches: Iterable[Any] = ()

    def follow(self, batches: Iterable[Any]) -> None:
        """Make the next iteration yield these batches."""
        self._batches = (batch[0] for batch in batches) if self._single else batches

    def __iter__(self) -> Iterator[Any]:
        # torch's iterator with workers calls this twice before it takes the first batch.
        return iter(self._batches)

    def __len__(self) -> int:
        return self.sharding.num_batches()
