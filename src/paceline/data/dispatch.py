"""Rank 0 reads everything and sends each rank its part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from paceline.collectives import BatchCounts
from paceline.collectives.nested import map_tensors, slice_tensors
from paceline.data.epochs import set_dataset_epoch, takes_epoch
from paceline.data.progress import Progress, RecordedProgress, Round, known
from paceline.data.randomness import SeededKeys, kept_randomness, mix_seed
from paceline.data.reading import Position, Reading, batch_text
from paceline.data.rows import complete, num_rows
from paceline.data.sharding import ShardedBatchSampler, split_rows
from paceline.data.stateful import keeper_of
from paceline.data.stream import reach, say_rereading
from paceline.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch.utils.data import DataLoader

    from paceline.collectives import Group
    from paceline.data.plan import Layout, Plan
    from paceline.data.sharding import PlannedSharding

__all__ = ["DispatchReading", "Feed", "PlannedFeed", "ReadFeed"]


@dataclass(frozen=True, slots=True)
class Share:
    """One global batch: each rank's part (None: nothing for that rank), the counts, the position after it.

    `stream` is the state of the stream there.
    """

    parts: list[Any]
    present: list[bool]
    counts: BatchCounts
    samples: int
    stream: dict[str, Any] | None = None


@dataclass(slots=True)
class Delivery:
    """What rank 0 sends to one rank: batches, each with what `Round` says of it as values.

    The values are counts, samples, whether it is the rank's last and whether it is everybody's. `streams` are
    the states of the stream after each batch; rank 0 keeps them to itself.
    """

    entries: list[tuple[Any, BatchCounts, int, bool, bool]] = field(default_factory=list)
    streams: list[dict[str, Any] | None] = field(default_factory=list)
    nothing_left: bool = False
    failure: str | None = None


class Feed:
    """Where rank 0 gets global batches from.

    Attributes:
        size: Samples of an epoch, None where that is not known.
        batches: Per rank, its batches in a whole epoch; None where that is not known.
        generator: Seeds the workers.
        rereads: Whether a position is reached by reading up to it.
        keeps_state: Whether positions hold the state of a stream.
        readers: How many readers share the data, where that makes a difference.
    """

    size: int | None = None
    batches: tuple[int, ...] | None = None
    generator: torch.Generator | None = None
    rereads = False
    keeps_state = False
    readers = 0

    def shares(self, seed: int, position: Position) -> Iterator[Share]:
        """Yield the global batches from a position on."""
        raise NotImplementedError

    def samples_before(self, seed: int, epoch: int, rounds: int) -> int | None:
        """Return the position after the first `rounds` global batches, None where only reading would tell."""
        return None

    def describe(self, seed: int) -> str:
        """Say in a few words what is read."""
        raise NotImplementedError


class PlannedFeed(Feed):
    """Global batches of a map-style data set, by arithmetic.

    Args:
        reader: Iterates `sampler`, whose batches are those of all ranks in turn.
        sampler: The reader's batch sampler.
        sharding: Lays out the epochs.
        ranks: How many ranks share a global batch.
    """

    def __init__(
        self, reader: DataLoader[Any], sampler: ShardedBatchSampler, sharding: PlannedSharding, ranks: int
    ) -> None:
        self._reader = reader
        self._tells_workers = reader.persistent_workers and takes_epoch(reader.dataset)
        self._sampler = sampler
        self._sharding = sharding
        self._ranks = ranks
        self.generator = reader.generator
        self.size = sharding.size()
        self.batches = tuple(sharding.num_batches_of(rank) for rank in range(ranks))

    def shares(self, seed: int, position: Position) -> Iterator[Share]:
        """See `Feed.shares`."""
        plan = self._sharding.plan(seed, position.epoch, position.samples)
        set_dataset_epoch(self._reader.dataset, position.epoch)
        self._sampler.follow(self._in_turn(plan, seed, position))
        batches = iter(self._reader)
        for index in range(plan.rounds):
            counts = plan.counts(index)
            present = [rows > 0 for rows in counts.rows]
            parts = [next(batches) if there else None for there in present]
            yield Share(parts, present, counts, plan.samples_after(index + 1))

    def samples_before(self, seed: int, epoch: int, rounds: int) -> int:
        """See `Feed.samples_before`."""
        return self._sharding.plan(seed, epoch, 0).samples_after(rounds)

    def _in_turn(self, plan: Plan, seed: int, position: Position) -> Iterator[list[Any]]:
        mixed, start = mix_seed(seed, position.epoch), position.batches
        epoch = position.epoch if self._tells_workers else None
        for index in range(plan.rounds):
            for rank in range(self._ranks):
                keys = plan.batch(index, rank)
                if keys and self._reader.num_workers:
                    keys = SeededKeys(keys, mix_seed(mixed, rank, start + index), epoch)
                if keys:
                    yield keys

    def describe(self, seed: int) -> str:
        """See `Feed.describe`."""
        samples = "an unknown number of samples" if self.size is None else f"{self.size:,} samples"
        return f"{samples}, {self._sharding.describe(seed)}"


class ReadFeed(Feed):
    """Global batches of what a loader yields: a batch per rank, or one batch cut into parts (`split`).

    Args:
        reader: Yields batches.
        layout: How they are dealt out.
        split: Whether each is cut into parts.
        length: How many it yields, where it says so itself.
    """

    rereads = True

    def __init__(self, reader: DataLoader[Any], layout: Layout, *, split: bool, length: int | None = None) -> None:
        if length is not None:
            size = layout.size
            whole = (length, 0) if split else divmod(length, size)
            every = layout.padded and whole[1] > 0
            self.batches = tuple(
                whole[0] + (not layout.drop_last and (every or rank < whole[1])) for rank in range(size)
            )
        self._reader = reader
        self._layout = layout
        self._split = split
        self._keeper = keeper_of(reader)
        self.keeps_state = self._keeper is not None
        self.generator = reader.generator
        self.readers = max(1, reader.num_workers)

    def shares(self, seed: int, position: Position) -> Iterator[Share]:
        """See `Feed.shares`; a position is reached by the stream's own state, or by reading up to it."""
        reach(self._reader.dataset, seed, position.epoch)
        restored = self._keeper is not None and self._keeper.load(position.stream)
        batches = iter(self._reader)
        samples = position.samples
        first = self._skip(batches, position) if samples and not restored else None
        take = 1 if self._split else self._layout.size
        while taken := list(islice(batches, take)):
            first = taken[0] if first is None else first
            parts, real = self._cut(taken[0]) if self._split else self._dealt(taken)
            samples += sum(real)
            if self._layout.drop_last and min(real) < max(1, self._layout.rows):
                return
            yield self._share(parts, real, first, samples)

    def _skip(self, batches: Iterator[Any], position: Position) -> Any:
        """Read up to a position; return the first batch."""
        say_rereading(self._reader, f"{position.samples} samples", position)
        skipped = 0
        first: Any = None
        with kept_randomness():
            while skipped < position.samples and (batch := next(batches, None)) is not None:
                first = batch if first is None else first
                skipped += num_rows(batch)
        return first

    def _dealt(self, batches: list[Any]) -> tuple[list[Any], list[int]]:
        missing = self._layout.size - len(batches)
        return [*batches, *[None] * missing], [*map(num_rows, batches), *[0] * missing]

    def _cut(self, batch: Any) -> tuple[list[Any], list[int]]:
        rows, size = num_rows(batch), self._layout.size
        # A short last batch is dealt out in full parts, so that only the last ranks get less.
        part = self._layout.rows or split_rows(rows, size)
        real = [min(part, max(0, rows - rank * part)) for rank in range(size)]
        parts = [
            _owned(slice_tensors(batch, slice(rank * part, rank * part + n))) if n else None
            for rank, n in enumerate(real)
        ]
        return parts, real

    def _share(self, parts: list[Any], real: list[int], first: Any, samples: int) -> Share:
        present = [n > 0 for n in real]
        rows = real
        if self._layout.padded:
            filler = next((part for part in parts if part is not None), first)
            wanted = self._layout.rows if self._layout.fill else 0
            parts = [filler if part is None else part for part in parts]
            rows = [n or num_rows(filler) for n in real]
            parts = [complete(p, n, wanted) if n < wanted else p for p, n in zip(parts, rows, strict=True)]
            rows = [max(n, wanted) for n in rows]
            present = [True] * len(parts)
        state = None if self._keeper is None else self._keeper.read()
        return Share(parts, present, BatchCounts(rows=tuple(rows), real=tuple(real)), samples, state)

    def describe(self, seed: int) -> str:
        """See `Feed.describe`."""
        return f"what {type(self._reader).__name__} yields"


class DispatchReading(Reading):
    """Rank 0 reads one global batch ahead and scatters the parts; the others never touch the data set.

    Args:
        feed: On rank 0.
        layout: How global batches are dealt out.
        group: The ranks.
        split: Whether a global batch is one batch of the user's loader.
    """

    def __init__(self, feed: Feed | None, layout: Layout, group: Group, *, split: bool) -> None:
        super().__init__(group)
        self._feed = feed
        self.total_batch_size = layout.global_rows or None
        self.splits = split
        if feed is not None and feed.generator is not None:
            self.generator = feed.generator
        facts = None
        if feed is not None:
            facts = (feed.size, feed.batches, feed.rereads, feed.keeps_state, feed.readers)
        # A data set without samples is noticed by all ranks alike.
        told: Any = group.broadcast_object(facts)
        self._size, self._batches, self.rereads, self._keeps_state, self._readers = told

    def begin(
        self, read: Callable[[], Iterator[Any]], seed: int, position: Position
    ) -> tuple[Iterator[Any], Progress] | None:
        """See `Reading.begin`."""
        deliveries = self._deliveries(seed, position)
        opening = next(deliveries)
        if opening.nothing_left:
            return None
        progress = RecordedProgress(position.samples)
        return _received(opening, deliveries, progress), progress

    def _deliveries(self, seed: int, position: Position) -> Iterator[Delivery]:
        """Send, on rank 0, and receive, on every rank, until this rank has its last batch."""
        rounds = None if self._feed is None else _rounds(self._feed.shares(seed, position), self._group.size)
        while True:
            error: Exception | None = None
            sent: list[Delivery] | None = None
            if rounds is not None:
                try:
                    sent = next(rounds)
                except Exception as caught:
                    error = caught
                    sent = [Delivery(failure=f"{type(caught).__name__}: {caught}")] * self._group.size
            delivery = self._group.scatter_object(sent)
            if error is not None:
                raise error
            if delivery.failure is not None:
                raise DataError(
                    f"Reading failed on rank 0: {delivery.failure}",
                    "With dispatch_batches=True rank 0 reads for all",
                    "See the traceback of rank 0",
                )
            yield delivery

    def num_batches(self) -> int:
        """See `Reading.num_batches`."""
        if self._batches is None:
            raise TypeError("this loader does not tell how many batches it yields")
        return int(self._batches[self._group.rank])

    @property
    def readers(self) -> int:
        """See `Reading.readers`."""
        return int(self._readers)

    def samples_before(self, seed: int, epoch: int, rounds: int) -> int:
        """See `Reading.samples_before`."""
        known = None if self._feed is None else self._feed.samples_before(seed, epoch, rounds)
        known = self._group.broadcast_object(known)
        return super().samples_before(seed, epoch, rounds) if known is None else int(known)

    @property
    def keeps_state(self) -> bool:
        """See `Reading.keeps_state`."""
        return bool(self._keeps_state)

    def num_rounds(self) -> int | None:
        """Return the global batches in a whole epoch, None where that is not known."""
        return None if self._batches is None else max(self._batches)

    def size(self) -> int | None:
        """See `Reading.size`."""
        return None if self._size is None else int(self._size)

    def describe(self, seed: int) -> str:
        """See `Reading.describe`."""
        what = "what rank 0 reads" if self._feed is None else self._feed.describe(seed)
        return f"{what}, read by rank 0 and sent out, {batch_text(self.total_batch_size, self._group.size)}"


def _received(opening: Delivery, deliveries: Iterator[Delivery], progress: RecordedProgress) -> Iterator[Any]:
    delivery = opening
    while delivery.entries:
        last = False
        streams = delivery.streams or [None] * len(delivery.entries)
        for (batch, counts, samples, last, ends), stream in zip(delivery.entries, streams, strict=True):
            progress.record(Round(counts, samples, known(last), known(ends), stream))
            yield batch
        if last:
            return
        delivery = next(deliveries)


def _rounds(shares: Iterator[Share], size: int) -> Iterator[list[Delivery]]:
    """Yield what to send, so that every rank takes part until all have their last batch.

    An incomplete last global batch travels together with the one before it: ranks that get nothing of it have
    left by then.
    """
    current = next(shares, None)
    if current is None:
        yield [Delivery(nothing_left=True) for _ in range(size)]
        return
    while current is not None:
        following = next(shares, None)
        bundle = [current]
        if following is not None and not all(following.present):
            bundle, following = [current, following], next(shares, None)
        yield [_delivery(bundle, rank, more=following is not None) for rank in range(size)]
        current = following


def _delivery(bundle: list[Share], rank: int, *, more: bool) -> Delivery:
    mine = [share for share in bundle if share.present[rank]]
    return Delivery(
        [(s.parts[rank], s.counts, s.samples, not more and s is mine[-1], not more and s is bundle[-1]) for s in mine],
        [share.stream for share in mine] if rank == 0 else [],
    )


def _owned(part: Any) -> Any:
    """Copy a part, which would otherwise be pickled with the whole batch behind it."""
    return map_tensors(lambda tensor: tensor.clone(), part)
