"""Merges the batches of several ranks into one batch of a single process, for `paceline parity`."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

from paceline.collectives import BatchCounts
from paceline.data.epoch_plan import EpochPlan
from paceline.data.sharding import PlannedSharding

if TYPE_CHECKING:
    from paceline.collectives import Group
    from paceline.data.epoch_plan import Layout

__all__ = ["MergedRanksSharding"]


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
