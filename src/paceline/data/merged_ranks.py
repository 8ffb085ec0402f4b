"""One process that gets the batches of several ranks as one, for `paceline parity`."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

from paceline.collectives import BatchCounts
from paceline.data.plan import Plan
from paceline.data.sharding import PlannedSharding

if TYPE_CHECKING:
    from paceline.collectives import Group

__all__ = ["MergedRanksSharding"]


class _MergedRanksPlan(Plan):
    """The batches of all ranks of another plan, one after the other."""

    def __init__(self, plan: Plan, size: int) -> None:
        self._plan = plan
        self._size = size
        self.rounds = plan.rounds

    def num_batches(self, rank: int) -> int:
        """See `Plan.num_batches`."""
        return self.rounds

    def batch(self, index: int, rank: int) -> list[Any]:
        """See `Plan.batch`."""
        having = (r for r in range(self._size) if index < self._plan.num_batches(r))
        return list(chain.from_iterable(self._plan.batch(index, r) for r in having))

    def counts(self, index: int) -> BatchCounts:
        """See `Plan.counts`."""
        counts = self._plan.counts(index)
        return BatchCounts(rows=(sum(counts.rows),), real=(sum(counts.real),))

    def samples_after(self, rounds: int) -> int:
        """See `Plan.samples_after`."""
        return self._plan.samples_after(rounds)


class MergedRanksSharding(PlannedSharding):
    """Deals all that `size` ranks would get out to one.

    Args:
        inner: Deals out to `size` ranks.
        size: How many.
        group: This process alone.
    """

    def __init__(self, inner: PlannedSharding, size: int, group: Group) -> None:
        super().__init__(group)
        self._inner = inner
        self._size = size
        self.total_batch_size = inner.total_batch_size
        self.splits = inner.splits

    def plan(self, seed: int, epoch: int, samples: int) -> Plan:
        """See `PlannedSharding.plan`."""
        plan = self._inner.plan(seed, epoch, samples)
        self.planned_rows = self._inner.planned_rows * self._size
        return _MergedRanksPlan(plan, self._size)

    def num_batches_of(self, rank: int) -> int:
        """See `PlannedSharding.num_batches_of`."""
        return self._inner.num_rounds() or 0

    def num_rounds(self) -> int | None:
        """See `Sharding.num_rounds`."""
        return self._inner.num_rounds()

    def size(self) -> int | None:
        """See `Sharding.size`."""
        return self._inner.size()

    def describe(self, seed: int) -> str:
        """See `Sharding.describe`."""
        return f"{self._inner.describe(seed)}, the batches of {self._size} ranks as one"
