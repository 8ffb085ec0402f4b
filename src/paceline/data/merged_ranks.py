"""One process that gets the batches of several ranks as one, for `paceline parity`."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

from paceline.collectives import BatchCounts
from paceline.data.plan import Plan
from paceline.data.sharding import PlannedSharding

if TYPE_CHECKING:
    from paceline.collectives import Group
    from paceline.data.plan import Layout

__all__ = ["MergedRanksSharding"]


class _MergedRanksPlan(Plan):
    """The batches of all ranks of another plan, one after the other."""

    def __init__(self, plan: Plan, layout: Layout) -> None:
        self._plan = plan
        self._layout = layout
        self.rounds = plan.rounds

    def num_batches(self, rank: int) -> int:
        """See `Plan.num_batches`."""
        return self.rounds

    def batch(self, index: int, rank: int) -> list[Any]:
        """See `Plan.batch`."""
        having = [r for r in range(self._layout.size) if index < self._plan.num_batches(r)]
        if not self._layout.fill:
            # A batch that a rank is given to take part with is needed by nobody here.
            having = [r for r in having if self._plan.counts(index).real[r]]
        return list(chain.from_iterable(self._plan.batch(index, r) for r in having))

    def counts(self, index: int) -> BatchCounts:
        """See `Plan.counts`."""
        counts = self._plan.counts(index)
        real = sum(counts.real)
        return BatchCounts(rows=(sum(counts.rows) if self._layout.fill else real,), real=(real,))

    def samples_after(self, rounds: int) -> int:
        """See `Plan.samples_after`."""
        return self._plan.samples_after(rounds)


class MergedRanksSharding(PlannedSharding):
    """Deals all that several ranks would get out to one.

    Args:
        inner: Deals out to those ranks.
        layout: How it does.
        group: This process alone.
    """

    def __init__(self, inner: PlannedSharding, layout: Layout, group: Group) -> None:
        super().__init__(group)
        self._inner = inner
        self._layout = layout
        self.total_batch_size = inner.total_batch_size
        self.splits = inner.splits

    def plan(self, seed: int, epoch: int, samples: int) -> Plan:
        """See `PlannedSharding.plan`."""
        plan = self._inner.plan(seed, epoch, samples)
        self.planned_rows = self._inner.planned_rows * self._layout.size
        return _MergedRanksPlan(plan, self._layout)

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
        return f"{self._inner.describe(seed)}, the batches of {self._layout.size} ranks as one"
