"""Rank 0 reads everything and sends each rank its part."""

from __future__ import annotations

import time
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import IterableDataset

from paceline.collectives import BatchCounts
from paceline.data.batch_packing import HEAD, Parcel, read_head, unpack
from paceline.data.epochs import set_dataset_epoch, takes_epoch
from paceline.data.randomness import PrivateRandomness, SeededKeys, mix_seed, seed_program
from paceline.data.read_ahead import Chunk, ChunkProgress, ReadAhead
from paceline.data.reading import Position, Reading, batch_text
from paceline.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from torch.utils.data import DataLoader

    from paceline.collectives import Group, Pending
    from paceline.data.plan import Layout, Plan
    from paceline.data.progress import Progress
    from paceline.data.sharding import PlannedSharding, ShardedBatchSampler
    from paceline.data.stream import StreamSource

__all__ = ["DispatchReading", "Feed", "PlannedFeed", "ReadFeed", "SplitBatches"]


@dataclass(frozen=True, slots=True)
class Share:
    """One global batch: each rank's part (None: nothing for that rank), and the counts.

    `stream` is the state of the stream after it.
    """

    parts: list[Any]
    counts: BatchCounts
    stream: dict[str, Any] | None = None

    @property
    def is_whole(self) -> bool:
        """Whether every rank has a part."""
        return all(self.counts.rows)


@dataclass(slots=True)
class Delivery:
    """What rank 0 sends to one rank: some global batches in a row.

    Attributes:
        batches: The rank's parts.
        rounds: How many global batches those are of; the last may lack a part for the rank.
        counts: Of each of them, or one for all.
        final: Whether no global batch comes after them.
        failure: Why nothing can be read after them.
    """

    batches: list[Any]
    rounds: int
    counts: list[BatchCounts] | BatchCounts
    final: bool
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
        workers: Whether other processes read.
        draws_here: Whether random numbers are drawn in this process while it is read.
    """

    size: int | None = None
    batches: tuple[int, ...] | None = None
    generator: torch.Generator | None = None
    rereads = False
    keeps_state = False
    readers = 0
    workers = False
    draws_here = True

    def shares(self, seed: int, position: Position, randomness: AbstractContextManager[Any]) -> Iterator[Share]:
        """Yield the global batches from a position on; `randomness` is for what is read before the first of them."""
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
        self.workers = reader.num_workers > 0
        self.draws_here = not self.workers
        self.size = sharding.size()
        self.batches = tuple(sharding.num_batches_of(rank) for rank in range(ranks))

    def shares(self, seed: int, position: Position, randomness: AbstractContextManager[Any]) -> Iterator[Share]:
        """See `Feed.shares`."""
        plan = self._sharding.plan(seed, position.epoch, position.samples)
        set_dataset_epoch(self._reader.dataset, position.epoch)
        self._sampler.follow(self._in_turn(plan, seed, position))
        batches = iter(self._reader)
        for index in range(plan.rounds):
            counts = plan.counts(index)
            yield Share([next(batches) if rows else None for rows in counts.rows], counts)

    def samples_before(self, seed: int, epoch: int, rounds: int) -> int:
        """See `Feed.samples_before`."""
        return self._sharding.plan(seed, epoch, 0).samples_after(rounds)

    def _in_turn(self, plan: Plan, seed: int, position: Position) -> Iterator[list[Any]]:
        """Yield the keys of all ranks; what is drawn while a batch is read depends on that batch only."""
        mixed, start = mix_seed(seed, position.epoch), position.batches
        epoch = position.epoch if self._tells_workers else None
        for index in range(plan.rounds):
            for rank in range(self._ranks):
                keys = plan.batch(index, rank)
                if not keys:
                    continue
                own = mix_seed(mixed, rank, start + index)
                if self.workers:
                    keys = SeededKeys(keys, own, epoch)
                else:
                    seed_program(own)
                yield keys

    def describe(self, seed: int) -> str:
        """See `Feed.describe`."""
        samples = "an unknown number of samples" if self.size is None else f"{self.size:,} samples"
        return f"{samples}, {self._sharding.describe(seed)}"


class ReadFeed(Feed):
    """Global batches of what a reader yields: a batch per rank in turn.

    Args:
        source: Where the batches come from.
        layout: How they are dealt out.
        length: How many it yields, where it says so itself.
    """

    rereads = True

    def __init__(self, source: StreamSource, layout: Layout, *, length: int | None = None) -> None:
        if length is not None:
            whole, left = divmod(length, layout.size)
            is_filled_up = layout.padded and left > 0
            self.batches = tuple(
                whole + (not layout.drop_last and (is_filled_up or rank < left)) for rank in range(layout.size)
            )
        self._source = source
        self._layout = layout
        self.keeps_state = source.keeper is not None
        self.generator = source.reader.generator
        self.readers = source.readers
        self.workers = source.reader.num_workers > 0
        # A sampler is run here, whoever reads what it names.
        self.draws_here = not (self.workers and isinstance(source.reader.dataset, IterableDataset))

    def shares(self, seed: int, position: Position, randomness: AbstractContextManager[Any]) -> Iterator[Share]:
        """See `Feed.shares`; a position is reached by the stream's own state, by skipping, or by reading up to it."""
        layout, keeper = self._layout, self._source.keeper
        before = position.batches * layout.size
        batches, _ = self._source.begin(
            seed, position, before, padded=layout.padded and layout.fill, randomness=randomness
        )
        while taken := list(islice(batches, layout.size)):
            missing = layout.size - len(taken)
            real = [*[batch.real for batch in taken], *[0] * missing]
            if layout.drop_last and min(real) < self._least:
                return
            parts, rows = [batch.data for batch in taken], [batch.rows for batch in taken]
            # Ranks that get nothing any more are given a batch of this round once more, to pad with.
            parts += [parts[0] if layout.padded else None] * missing
            rows += [rows[0] if layout.padded else 0] * missing
            state = None if keeper is None else keeper.read()
            yield Share(parts, BatchCounts(rows=tuple(rows), real=tuple(real), counted=self._source.counted), state)

    @property
    def _least(self) -> int:
        """Samples that a batch has at least if incomplete ones are left out."""
        return max(1, self._source.rows)

    def describe(self, seed: int) -> str:
        """See `Feed.describe`."""
        reader = self._source.reader
        return f"what {type(reader).__name__} yields, {self._source.resumes_by()} within an epoch"


class SplitBatches:
    """The batches of keys of a batch sampler without a length, each cut into a part per rank.

    Only the last may be cut unevenly, so that its last parts are short or missing.
    """

    def __init__(self, batches: Any, size: int) -> None:
        self._batches = batches
        self._size = size

    def __iter__(self) -> Iterator[list[Any]]:
        batches = iter(self._batches)
        batch = next(batches, None)
        while batch is not None:
            keys, batch = list(batch), next(batches, None)
            if len(keys) % self._size and batch is not None:
                raise DataError(
                    f"A batch of the batch sampler has {len(keys)} samples for {self._size} ranks",
                    "split_batches=True gives each rank an equal part of every batch",
                    f"Make batches whose sizes are multiples of {self._size}, or use split_batches=False",
                )
            part = -(-len(keys) // self._size)
            yield from (keys[at : at + part] for at in range(0, len(keys), part))


class DispatchReading(Reading):
    """Rank 0 reads a little ahead and scatters the parts; the others never touch the data set.

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
        sender = None
        if self._feed is not None:
            # Drawn apart from the program, or it would depend on how far ahead is read.
            private = PrivateRandomness(mix_seed(seed, position.epoch)) if self._feed.draws_here else None
            sender = _Sender(self._feed, seed, position, private)
        run = _Run(self._group, sender, position.samples)
        return (run.batches(), run.progress) if run.open() else None

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


# Bytes in the exchange that brings the first delivery, and how much more than the last took is kept for the next.
FIRST_CAPACITY = 16 * 1024
ROOM = 1.25


class _Sender:
    """Reads global batches on rank 0, and packs what each rank gets of them.

    Args:
        feed: Where they come from.
        seed: Of the order.
        position: Where to begin.
        private: What is drawn at random while batches are read, where that is not done by workers.
    """

    def __init__(self, feed: Feed, seed: int, position: Position, private: PrivateRandomness | None) -> None:
        self._around = nullcontext if private is None else private
        self.workers = feed.workers
        self.keeps_state = feed.keeps_state
        self._shares = feed.shares(seed, position, self._around())
        self._read: deque[Share] = deque()
        self._ended = False
        self._ahead = ReadAhead()
        self.size = 1
        self.error: Exception | None = None

    def fill(self, wanted: int) -> None:
        """Read until so many global batches are here, or until the end."""
        if len(self._read) >= wanted or self._ended:
            return
        with self._around():
            while len(self._read) < wanted and not self._ended:
                self._read_one()

    def keep_up(self) -> None:
        """Read one more while a batch is used, if workers have it ready."""
        if self.workers and len(self._read) <= self.size:
            self.fill(len(self._read) + 1)

    def _read_one(self) -> None:
        try:
            share = next(self._shares, None)
        except Exception as error:
            # What was read before it is used before it.
            self.error = error
            share = None
        if share is None:
            self._ended = True
        else:
            self._read.append(share)

    def spent(self, seconds: float) -> None:
        """Note how long the last exchange took."""
        self._ahead.spent = seconds

    def take(self, given: int) -> tuple[list[Share], bool]:
        """Take the next chunk, and whether nothing comes after it.

        An incomplete last global batch travels together with the one before it: ranks that get nothing of it have
        left by then.

        Args:
            given: Global batches handed out since the last call.
        """
        self.fill(self.size + 1)
        chunk = [self._read.popleft() for _ in range(min(self.size, len(self._read)))]
        if self._read and not self._read[0].is_whole:
            chunk.append(self._read.popleft())
            self.fill(1)
        self.size = self._ahead.next_size(given, chunk[-1].parts if chunk else None)
        return chunk, self._ended and not self._read and self.error is None

    def deliveries(self, chunk: list[Share], size: int, *, final: bool) -> list[Delivery]:
        """Make what each rank gets of a chunk."""
        failure = None
        if self.error is not None and self._ended and not self._read:
            failure = f"{type(self.error).__name__}: {self.error}"
        counts: Any = [share.counts for share in chunk]
        if counts and all(other == counts[0] for other in counts):
            counts = counts[0]
        return [
            Delivery([s.parts[rank] for s in chunk if s.counts.rows[rank]], len(chunk), counts, final, failure)
            for rank in range(size)
        ]


class _Run:
    """One dispatched pass on this rank.

    Args:
        group: The ranks.
        sender: On rank 0.
        samples: Position at which the pass begins.
    """

    def __init__(self, group: Group, sender: _Sender | None, samples: int) -> None:
        self._group = group
        self._sender = sender
        self.progress = ChunkProgress(samples, self._more, self._everybody_ends)
        self._capacity = FIRST_CAPACITY
        self._into = torch.empty(0, dtype=torch.uint8)
        self._parts = torch.empty(0, 0, dtype=torch.uint8)
        # Parcels that are larger than the exchange, whole.
        self._whole: list[torch.Tensor] = []
        self._own: tuple[Delivery, list[Any]] | None = None
        self._pending: Pending | None = None
        self._delivery: Delivery
        # Global batches in the deliveries received, and handed out since the last was started.
        self._rounds = self._given = 0

    def open(self) -> bool:
        """Receive the first delivery; return whether there is anything in it."""
        self._start()
        self._receive()
        return self._delivery.rounds > 0 or self._delivery.failure is not None

    def batches(self) -> Iterator[Any]:
        """Yield this rank's batches."""
        sender = self._sender
        while True:
            delivery = self._delivery
            goes_on = not delivery.final and delivery.failure is None
            half = delivery.rounds // 2
            for index, batch in enumerate(delivery.batches):
                if index == half and goes_on:
                    self._start()
                elif sender is not None:
                    sender.keep_up()
                self._given += 1
                yield batch
            if delivery.failure is not None:
                raise self._failed(delivery.failure)
            if not goes_on:
                return
            self._receive()

    def _failed(self, text: str) -> Exception:
        if self._sender is not None and self._sender.error is not None:
            return self._sender.error
        return DataError(
            f"Reading failed on rank 0: {text}",
            "With dispatch_batches=True rank 0 reads for all",
            "See the traceback of rank 0",
        )

    def _more(self) -> bool:
        return not self._delivery.final

    def _everybody_ends(self) -> bool:
        return self.progress.handed == self._rounds

    def _start(self) -> None:
        """Send, on rank 0, and begin to receive the next delivery."""
        if self._into.numel() != self._capacity:
            self._into = torch.empty(self._capacity, dtype=torch.uint8)
        parts = None if self._sender is None else self._packed(self._sender)
        self._given = 0
        self._pending = self._group.start_scatter(parts, self._into)

    def _packed(self, sender: _Sender) -> list[torch.Tensor]:
        """Read and pack the next chunk for all; return one tensor of bytes for each rank."""
        size, capacity = self._group.size, self._capacity
        chunk, final = sender.take(self._given)
        deliveries = sender.deliveries(chunk, size, final=final)
        try:
            parcels = [Parcel.of(delivery) for delivery in deliveries[1:]]
        except Exception as error:
            # Every rank learns of it.
            sender.error, chunk = error, []
            text = f"what was read cannot be sent: {type(error).__name__}: {error}"
            deliveries = [Delivery([], 0, [], final=False, failure=text) for _ in range(size)]
            parcels = [Parcel.of(delivery) for delivery in deliveries[1:]]
        self._own = deliveries[0], [share.stream for share in chunk]
        if self._parts.shape != (size, capacity):
            self._parts = torch.empty((size, capacity), dtype=torch.uint8)
        largest = max(parcel.size for parcel in parcels)
        following = FIRST_CAPACITY + int(ROOM * largest * (sender.size + 1) / max(1, len(chunk)))
        parts = list(self._parts)
        self._whole = []
        for parcel, part in zip(parcels, parts[1:], strict=True):
            if largest <= capacity:
                parcel.write(part, largest, following)
                continue
            whole = torch.empty(largest, dtype=torch.uint8)
            parcel.write(whole, largest, following)
            part.copy_(whole[:capacity])
            self._whole.append(whole)
        # This rank needs nothing but the head.
        parts[0][:HEAD] = parts[1][:HEAD]
        return parts

    def _receive(self) -> None:
        """Wait for the delivery that was started last."""
        assert self._pending is not None
        before = time.perf_counter()
        data = self._pending.wait()
        self._pending = None
        if self._sender is not None:
            self._sender.spent(time.perf_counter() - before)
        largest, capacity = read_head(data)
        if largest > data.numel():
            data = torch.cat([data, self._rest(data.numel(), largest)])
        states: list[dict[str, Any] | None] | None = None
        if self._own is None:
            self._delivery = unpack(data)
        else:
            self._delivery, states = self._own
            self._own = None
        self._capacity = capacity
        self._rounds += self._delivery.rounds
        if self._delivery.batches:
            self.progress.add(Chunk(len(self._delivery.batches), self._delivery.counts, states))

    def _rest(self, sent: int, largest: int) -> torch.Tensor:
        """Exchange what did not fit in."""
        parts = None
        if self._sender is not None:
            parts = [torch.empty(largest - sent, dtype=torch.uint8), *[whole[sent:] for whole in self._whole]]
            self._whole = []
        return self._group.start_scatter(parts, torch.empty(largest - sent, dtype=torch.uint8)).wait()
