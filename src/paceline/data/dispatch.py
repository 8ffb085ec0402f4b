"""Dispatching: rank 0 reads every batch and sends each rank its part."""

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
from paceline.data.batch_packing import HEADER_BYTES, PackedBatch, read_header, unpack
from paceline.data.batch_source import BatchSource, Position, batch_text
from paceline.data.epoch_plan import check_not_empty, indivisible
from paceline.data.epochs import has_set_epoch, set_dataset_epoch
from paceline.data.randomness import IsolatedRng, SeededKeys, mix_seed, seed_global_rngs
from paceline.data.read_ahead import Chunk, ChunkProgress, ReadAhead
from paceline.data.reused_memory import ReusedMemory
from paceline.data.sample_order import sampler_generators, set_sampler_epoch
from paceline.environment.object_state import OwnGenerators
from paceline.errors import DataError, counted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from torch.utils.data import DataLoader

    from paceline.collectives import Group, Pending
    from paceline.data.epoch_plan import EpochPlan, Layout
    from paceline.data.iteration_progress import IterationProgress
    from paceline.data.sharding import PlannedSharding, ShardedBatchSampler
    from paceline.data.stream import StreamReader

__all__ = [
    "DispatchBatchSource",
    "GlobalBatches",
    "MapGlobalBatches",
    "NonEmptyBatches",
    "SplitBatches",
    "StreamGlobalBatches",
]


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """One global batch.

    Attributes:
        parts: Each rank's batch; None for a rank that gets none.
        counts: Samples per rank.
        stream: The state of the stream after it, if there is one.
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
    """What rank 0 sends to one rank: its parts of some consecutive global batches.

    Attributes:
        batches: The rank's parts.
        num_global_batches: How many global batches they belong to; the last one may have no part for the rank.
        counts: Samples per rank, of each global batch or one for all.
        final: Whether no global batch follows.
        failure: Why nothing more can be read; None if reading did not fail.
    """

    batches: list[Any]
    num_global_batches: int
    counts: list[BatchCounts] | BatchCounts
    final: bool
    failure: str | None = None


class GlobalBatches:
    """Where rank 0 gets global batches from.

    Attributes:
        size: Samples of an epoch, None if unknown.
        batches: The number of batches in a whole epoch, per rank; None if unknown.
        generator: Seeds the workers.
        rereads: Whether a position is reached by reading up to it.
        has_stream_state: Whether positions include the state of a stream.
        readers: The number of readers that share the data; 0 if that makes no difference.
        workers: Whether loader workers read.
        draws_in_process: Whether this process draws random numbers while it reads.
        sampler: What yields the keys, if it runs while batches are read; None if it runs before.
    """

    size: int | None = None
    batches: tuple[int, ...] | None = None
    generator: torch.Generator | None = None
    rereads = False
    has_stream_state = False
    readers = 0
    workers = False
    draws_in_process = True
    sampler: Any = None

    def read(self, seed: int, position: Position, isolated_rng: IsolatedRng | None) -> Iterator[GlobalBatch]:
        """Yield the global batches from a position on.

        Args:
            seed: The seed of the order.
            position: Where to begin.
            isolated_rng: The random state while batches are read; None if workers read them.
        """
        raise NotImplementedError

    def samples_before(self, seed: int, epoch: int, num_batches: int) -> int | None:
        """Return the position after the first `num_batches` global batches, None if they would have to be read."""
        return None

    def describe(self, seed: int) -> str:
        """Describe in a few words what is read."""
        raise NotImplementedError


class MapGlobalBatches(GlobalBatches):
    """Global batches of a map-style data set.

    Args:
        reader: Reads the batches of `sampler`.
        sampler: The reader's batch sampler; it yields the batches of all ranks in turn.
        sharding: Distributes the samples of an epoch.
        ranks: The number of ranks that share a global batch.
    """

    def __init__(
        self, reader: DataLoader[Any], sampler: ShardedBatchSampler, sharding: PlannedSharding, ranks: int
    ) -> None:
        self._reader = reader
        self._sets_worker_epoch = reader.persistent_workers and has_set_epoch(reader.dataset)
        self._sampler = sampler
        self._sharding = sharding
        self._ranks = ranks
        self.generator = reader.generator
        self.workers = reader.num_workers > 0
        self.draws_in_process = not self.workers
        self._generators = OwnGenerators({"dataset": reader.dataset, "collate_fn": reader.collate_fn})
        self.size = sharding.size()
        self.batches = tuple(sharding.num_batches_of(rank) for rank in range(ranks))

    def read(self, seed: int, position: Position, isolated_rng: IsolatedRng | None) -> Iterator[GlobalBatch]:
        """See `GlobalBatches.read`."""
        plan = self._sharding.plan(seed, position.epoch, position.samples)
        set_dataset_epoch(self._reader.dataset, position.epoch)
        self._sampler.set_batches(self._keys_of_all_ranks(plan, seed, position))
        batches: Iterator[Any] = iter(self._reader)
        if not self.workers:
            batches = map(ReusedMemory().apart, batches)
        for index in range(plan.num_global_batches):
            counts = plan.counts(index)
            yield GlobalBatch([next(batches) if rows else None for rows in counts.rows], counts)

    def samples_before(self, seed: int, epoch: int, num_batches: int) -> int:
        """See `GlobalBatches.samples_before`."""
        return self._sharding.samples_before(seed, epoch, num_batches)

    def _keys_of_all_ranks(self, plan: EpochPlan, seed: int, position: Position) -> Iterator[list[Any]]:
        """Yield the keys of all ranks in turn; random numbers drawn while a batch is read depend on that batch only."""
        epoch_seed = mix_seed(seed, position.epoch)
        worker_epoch = position.epoch if self._sets_worker_epoch else None
        for index in range(plan.num_global_batches):
            for rank in range(self._ranks):
                keys = plan.batch(index, rank)
                if not keys:
                    continue
                batch_seed = mix_seed(epoch_seed, rank, position.batches + index)
                if self.workers:
                    keys = SeededKeys(keys, batch_seed, worker_epoch)
                else:
                    seed_global_rngs(batch_seed)
                    self._generators.seed(batch_seed)
                yield keys

    def describe(self, seed: int) -> str:
        """See `GlobalBatches.describe`."""
        samples = "an unknown number of samples" if self.size is None else counted(self.size, "sample")
        return f"{samples}, {self._sharding.describe(seed)}"


class StreamGlobalBatches(GlobalBatches):
    """Global batches of what a reader yields: one batch per rank in turn.

    Args:
        reader: Reads the batches.
        layout: How they are distributed.
        length: The number of batches that it yields, if known.
        size: The number of samples in them, if known.
        sampler: What yields the keys of map-style data.
    """

    rereads = True

    def __init__(
        self,
        reader: StreamReader,
        layout: Layout,
        *,
        length: int | None = None,
        size: int | None = None,
        sampler: Any = None,
    ) -> None:
        self.size = size
        self.sampler = sampler
        if length is not None:
            whole, rest = divmod(length, layout.num_ranks)
            pads_rest = layout.padded and rest > 0
            self.batches = tuple(
                whole + (not layout.drop_last and (pads_rest or rank < rest)) for rank in range(layout.num_ranks)
            )
        self._reader = reader
        self._layout = layout
        self.has_stream_state = reader.state_handle is not None
        self.generator = reader.reader.generator
        self.readers = reader.readers
        self.workers = reader.reader.num_workers > 0
        # A sampler runs in this process, even if workers read what it yields.
        self.draws_in_process = not (self.workers and isinstance(reader.reader.dataset, IterableDataset))

    def read(self, seed: int, position: Position, isolated_rng: IsolatedRng | None) -> Iterator[GlobalBatch]:
        """See `GlobalBatches.read`; see `StreamReader.begin` for how a position is reached."""
        layout, state_handle = self._layout, self._reader.state_handle
        if self.sampler is not None:
            set_sampler_epoch(self.sampler, position.epoch)
        batches_before = position.batches * layout.num_ranks
        batches, _ = self._reader.begin(
            seed, position, batches_before, padded=layout.padded and layout.fill, isolated_rng=isolated_rng
        )
        smallest_whole = max(1, self._reader.batch_size)
        while taken := list(islice(batches, layout.num_ranks)):
            missing = layout.num_ranks - len(taken)
            real = [*[batch.real for batch in taken], *[0] * missing]
            if layout.drop_last and min(real) < smallest_whole:
                return
            parts, rows = [batch.data for batch in taken], [batch.rows for batch in taken]
            # Ranks without a batch get the first one of this global batch again, as padding.
            parts += [parts[0] if layout.padded else None] * missing
            rows += [rows[0] if layout.padded else 0] * missing
            counts = BatchCounts(rows=tuple(rows), real=tuple(real), counted=self._reader.counted)
            yield GlobalBatch(parts, counts, None if state_handle is None else state_handle.read())

    def describe(self, seed: int) -> str:
        """See `GlobalBatches.describe`."""
        return f"what {type(self._reader.reader).__name__} yields, {self._reader.describe_resuming()} within an epoch"


class NonEmptyBatches:
    """The batches of keys of a batch sampler without a length; one without samples is an error.

    Args:
        batches: The batch sampler.
    """

    def __init__(self, batches: Any) -> None:
        self.batch_sampler = batches

    def __iter__(self) -> Iterator[list[Any]]:
        for batch in self.batch_sampler:
            keys = list(batch)
            check_not_empty([keys], self.batch_sampler)
            yield keys


class SplitBatches:
    """The batches of keys of a batch sampler without a length, each split into a part per rank.

    Only the last batch may be split unevenly, so that its last parts are short or missing.

    Args:
        batches: The batch sampler.
        num_ranks: The number of parts.
    """

    def __init__(self, batches: Any, num_ranks: int) -> None:
        self.batch_sampler = batches
        self._num_ranks = num_ranks

    def __iter__(self) -> Iterator[list[Any]]:
        batches = iter(self.batch_sampler)
        batch = next(batches, None)
        while batch is not None:
            keys, batch = list(batch), next(batches, None)
            if len(keys) % self._num_ranks and batch is not None:
                raise indivisible("A batch", len(keys), self._num_ranks)
            part_size = -(-len(keys) // self._num_ranks)
            yield from (keys[start : start + part_size] for start in range(0, len(keys), part_size))


class DispatchBatchSource(BatchSource):
    """Rank 0 reads a little ahead and scatters the parts; the other ranks never read the data set.

    Args:
        global_batches: Where rank 0 gets the batches from; None on the other ranks.
        layout: How global batches are distributed.
        group: The ranks.
        split: Whether a global batch is one batch of the user's loader.
    """

    def __init__(self, global_batches: GlobalBatches | None, layout: Layout, group: Group, *, split: bool) -> None:
        super().__init__(group)
        self._global_batches = global_batches
        self._layout = layout
        self.total_batch_size = layout.global_batch_size or None
        self.splits = split
        properties: Any = None
        if global_batches is not None:
            if global_batches.generator is not None:
                self.generator = global_batches.generator
            properties = (
                global_batches.size,
                global_batches.batches,
                global_batches.rereads,
                global_batches.has_stream_state,
                global_batches.readers,
            )
        # All ranks know them, so that all raise the same error for a data set without samples.
        properties = group.broadcast_object(properties)
        self._size, self._batches, self.rereads, self._has_stream_state, self._readers = properties

    def begin(
        self, read: Callable[[], Iterator[Any]], seed: int, position: Position
    ) -> tuple[Iterator[Any], IterationProgress] | None:
        """See `BatchSource.begin`."""
        sender = None
        if self._global_batches is not None:
            # Isolated, because random numbers would otherwise depend on how far ahead is read.
            isolated_rng = None
            if self._global_batches.draws_in_process:
                generators = sampler_generators(self._global_batches.sampler)
                isolated_rng = IsolatedRng(mix_seed(seed, position.epoch), generators)
            sender = _ChunkSender(self._global_batches, seed, position, isolated_rng)
        iteration = _DispatchIteration(self._group, sender, position.samples)
        return (iteration.batches(), iteration.progress) if iteration.open() else None

    def num_batches(self) -> int:
        """See `BatchSource.num_batches`."""
        if self._batches is None:
            raise TypeError("this loader has no length: the number of its batches is unknown")
        return int(self._batches[self._group.rank])

    def may_differ_from_length(self, samples: int) -> bool:
        """See `BatchSource.may_differ_from_length`; each worker may have a short last batch of its own."""
        size = self.size()
        if size is None or not self.rereads:
            return False
        droppable = self._layout.global_batch_size * self.readers if self._layout.drop_last else 0
        return 0 <= size - samples <= droppable

    @property
    def readers(self) -> int:
        """See `BatchSource.readers`."""
        return int(self._readers)

    def samples_before(self, seed: int, epoch: int, num_batches: int) -> int:
        """See `BatchSource.samples_before`."""
        samples = None
        if self._global_batches is not None:
            samples = self._global_batches.samples_before(seed, epoch, num_batches)
        samples = self._group.broadcast_object(samples)
        return super().samples_before(seed, epoch, num_batches) if samples is None else int(samples)

    @property
    def has_stream_state(self) -> bool:
        """See `BatchSource.has_stream_state`."""
        return bool(self._has_stream_state)

    def num_global_batches(self) -> int | None:
        """Return the number of global batches in a whole epoch, None if unknown."""
        return None if self._batches is None else max(self._batches)

    def size(self) -> int | None:
        """See `BatchSource.size`."""
        return None if self._size is None else int(self._size)

    def describe(self, seed: int) -> str:
        """See `BatchSource.describe`."""
        what = "what rank 0 reads" if self._global_batches is None else self._global_batches.describe(seed)
        return f"{what}, read by rank 0 and sent out, {batch_text(self.total_batch_size, self._group.size)}"


# Bytes of the first exchange, and how much larger than the last delivery the next exchange is made.
FIRST_CAPACITY = 16 * 1024
CAPACITY_FACTOR = 1.25


class _ChunkSender:
    """Reads global batches on rank 0 and turns them into deliveries.

    Args:
        global_batches: Where they come from.
        seed: The seed of the order.
        position: Where to begin.
        isolated_rng: The random state while batches are read; None if workers read them.
    """

    def __init__(
        self, global_batches: GlobalBatches, seed: int, position: Position, isolated_rng: IsolatedRng | None
    ) -> None:
        self._rng_context: Callable[[], AbstractContextManager[Any]] = isolated_rng or nullcontext
        self._workers = global_batches.workers
        self._batches = global_batches.read(seed, position, isolated_rng)
        self._read: deque[GlobalBatch] = deque()
        self._ended = False
        self._read_ahead = ReadAhead()
        self.chunk_size = 1
        self.error: Exception | None = None

    def fill(self, wanted: int) -> None:
        """Read until there are `wanted` global batches, or until the end."""
        if len(self._read) >= wanted or self._ended:
            return
        with self._rng_context():
            while len(self._read) < wanted and not self._ended:
                self._read_one()

    def keep_up(self) -> None:
        """Read one more batch while another is used, if workers have it ready."""
        if self._workers and len(self._read) <= self.chunk_size:
            self.fill(len(self._read) + 1)

    def _read_one(self) -> None:
        try:
            batch = next(self._batches, None)
        except Exception as error:
            # Batches read before the failure are used first.
            self.error = error
            batch = None
        if batch is None:
            self._ended = True
        else:
            self._read.append(batch)

    def record_exchange(self, seconds: float) -> None:
        """Record how long the last exchange took."""
        self._read_ahead.exchange_seconds = seconds

    def take(self, num_yielded: int) -> tuple[list[GlobalBatch], bool]:
        """Take the next chunk; also return whether nothing follows it.

        An incomplete last global batch is sent together with the one before it, because ranks that get nothing of it
        have left the iteration by then.

        Args:
            num_yielded: Global batches yielded since the last call.
        """
        self.fill(self.chunk_size + 1)
        chunk = [self._read.popleft() for _ in range(min(self.chunk_size, len(self._read)))]
        if self._read and not self._read[0].is_whole:
            chunk.append(self._read.popleft())
            self.fill(1)
        self.chunk_size = self._read_ahead.next_size(num_yielded, chunk[-1].parts if chunk else None)
        return chunk, self._ended and not self._read and self.error is None

    def deliveries(self, chunk: list[GlobalBatch], num_ranks: int, *, final: bool) -> list[Delivery]:
        """Return what each rank gets of a chunk."""
        failure = None
        if self.error is not None and self._ended and not self._read:
            failure = f"{type(self.error).__name__}: {self.error}"
        counts: Any = [batch.counts for batch in chunk]
        if counts and all(other == counts[0] for other in counts):
            counts = counts[0]
        deliveries = []
        for rank in range(num_ranks):
            parts = [batch.parts[rank] for batch in chunk if batch.counts.rows[rank]]
            deliveries.append(Delivery(parts, len(chunk), counts, final, failure))
        return deliveries


class _DispatchIteration:
    """One iteration over dispatched batches on this rank.

    Args:
        group: The ranks.
        sender: Reads the batches on rank 0; None on the other ranks.
        samples: Position at which the iteration begins.
    """

    def __init__(self, group: Group, sender: _ChunkSender | None, samples: int) -> None:
        self._group = group
        self._sender = sender
        self.progress = ChunkProgress(samples, self._has_more, self._all_ranks_end)
        self._capacity = FIRST_CAPACITY
        self._into = torch.empty(0, dtype=torch.uint8)
        self._parts = torch.empty(0, 0, dtype=torch.uint8)
        # Packed deliveries that are larger than the exchange.
        self._oversized: list[torch.Tensor] = []
        # Rank 0 keeps its own delivery, and the states of the stream after the batches.
        self._local: tuple[Delivery, list[Any]] | None = None
        self._pending: Pending | None = None
        self._delivery: Delivery
        # Global batches received so far, and yielded since the last exchange was started.
        self._received = self._num_yielded = 0

    def open(self) -> bool:
        """Receive the first delivery; return whether there is anything in it."""
        self._start_exchange()
        self._receive()
        return self._delivery.num_global_batches > 0 or self._delivery.failure is not None

    def batches(self) -> Iterator[Any]:
        """Yield this rank's batches."""
        sender = self._sender
        while True:
            delivery = self._delivery
            continues = not delivery.final and delivery.failure is None
            half = delivery.num_global_batches // 2
            for index, batch in enumerate(delivery.batches):
                if index == half and continues:
                    self._start_exchange()
                elif sender is not None:
                    sender.keep_up()
                self._num_yielded += 1
                yield batch
            if delivery.failure is not None:
                raise self._error(delivery.failure)
            if not continues:
                return
            self._receive()

    def _error(self, reason: str) -> Exception:
        if self._sender is not None and self._sender.error is not None:
            return self._sender.error
        return DataError(
            f"Reading failed on rank 0: {reason}",
            "With dispatch_batches=True rank 0 reads for all ranks",
            "See the traceback of rank 0",
        )

    def _has_more(self) -> bool:
        return not self._delivery.final

    def _all_ranks_end(self) -> bool:
        return self.progress.num_yielded == self._received

    def _start_exchange(self) -> None:
        """Begin to receive the next delivery; rank 0 reads and sends it."""
        if self._into.numel() != self._capacity:
            self._into = torch.empty(self._capacity, dtype=torch.uint8)
        parts = None if self._sender is None else self._pack_next_chunk(self._sender)
        self._num_yielded = 0
        self._pending = self._group.start_scatter(parts, self._into)

    def _pack_next_chunk(self, sender: _ChunkSender) -> list[torch.Tensor]:
        """Read and pack the next chunk; return one tensor of bytes for each rank."""
        size, capacity = self._group.size, self._capacity
        chunk, final = sender.take(self._num_yielded)
        deliveries = sender.deliveries(chunk, size, final=final)
        try:
            packed = [PackedBatch.of(delivery) for delivery in deliveries[1:]]
        except Exception as error:
            # Every rank must learn of it.
            sender.error, chunk = error, []
            reason = f"the batch cannot be sent to other ranks: {type(error).__name__}: {error}"
            deliveries = [Delivery([], 0, [], final=False, failure=reason) for _ in range(size)]
            packed = [PackedBatch.of(delivery) for delivery in deliveries[1:]]
        self._local = deliveries[0], [batch.stream for batch in chunk]
        if self._parts.shape != (size, capacity):
            self._parts = torch.empty((size, capacity), dtype=torch.uint8)
        largest = max(delivery.size for delivery in packed)
        next_capacity = FIRST_CAPACITY + int(CAPACITY_FACTOR * largest * (sender.chunk_size + 1) / max(1, len(chunk)))
        parts = list(self._parts)
        self._oversized = []
        for delivery, part in zip(packed, parts[1:], strict=True):
            if largest <= capacity:
                delivery.write(part, largest, next_capacity)
                continue
            whole = torch.empty(largest, dtype=torch.uint8)
            delivery.write(whole, largest, next_capacity)
            part.copy_(whole[:capacity])
            self._oversized.append(whole)
        # Rank 0 needs only the header.
        parts[0][:HEADER_BYTES] = parts[1][:HEADER_BYTES]
        return parts

    def _receive(self) -> None:
        """Wait for the delivery of the exchange that was started last."""
        assert self._pending is not None
        before = time.perf_counter()
        data = self._pending.wait()
        self._pending = None
        if self._sender is not None:
            self._sender.record_exchange(time.perf_counter() - before)
        largest, self._capacity = read_header(data)
        if largest > data.numel():
            data = torch.cat([data, self._exchange_rest(data.numel(), largest)])
        states: list[dict[str, Any] | None] | None = None
        if self._local is None:
            self._delivery = unpack(data)
        else:
            self._delivery, states = self._local
            self._local = None
        self._received += self._delivery.num_global_batches
        if self._delivery.batches:
            self.progress.add(Chunk(len(self._delivery.batches), self._delivery.counts, states))

    def _exchange_rest(self, sent: int, largest: int) -> torch.Tensor:
        """Exchange what did not fit into the first exchange."""
        parts = None
        if self._sender is not None:
            parts = [torch.empty(largest - sent, dtype=torch.uint8), *[whole[sent:] for whole in self._oversized]]
            self._oversized = []
        return self._group.start_scatter(parts, torch.empty(largest - sent, dtype=torch.uint8)).wait()
