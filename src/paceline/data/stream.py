"""Reads batches whose number is unknown beforehand, and lets the ranks agree on where they end."""

from __future__ import annotations

import copy
import logging
import time
from collections import deque
from contextlib import nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from paceline.collectives import BatchCounts
from paceline.data.batch_source import BatchSource, batch_text
from paceline.data.counting import CountedBatch, CountingCollate
from paceline.data.direct_reading import can_read_directly, read_directly
from paceline.data.epochs import set_dataset_epoch
from paceline.data.iteration_progress import IterationProgress
from paceline.data.randomness import IsolatedRng, mix_seed
from paceline.data.read_ahead import Chunk, ChunkProgress, ReadAhead
from paceline.data.reused_memory import ReusedMemory
from paceline.data.sample_order import maybe_length
from paceline.data.stateful import StatefulShard, maybe_state_handle
from paceline.data.worker_split import StreamShard, maybe_skip_method
from paceline.errors import DataError, counted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from paceline.collectives import Group, Pending
    from paceline.data.batch_source import Position
    from paceline.data.epoch_plan import Layout

__all__ = ["StreamBatchSource", "StreamReader"]

logger = logging.getLogger(__name__)

_NONE: Any = object()

# A rank's message about a chunk begins with these numbers, before the samples of each batch: how many global batches it
# would like the next chunk to have, how many batches it has for this one, and whether all of those are full.
HEADER_LENGTH = 3

# Exchanging the random state takes about 0.1 ms: a single process reads up to eight batches of a fast stream at once.
MAX_READ_AHEAD = 8
READ_AHEAD_SECONDS = 0.25e-3


class StreamReader:
    """A `DataLoader` over a stream, whose iteration can begin at a position.

    Args:
        reader: Yields this rank's batches in host memory.
        batch_size: Samples in a whole batch, if the reader counts them; 0 if its batches are taken whole.
    """

    def __init__(self, reader: DataLoader[Any], batch_size: int) -> None:
        self.reader = reader
        self.batch_size = batch_size
        self.counted = isinstance(reader.collate_fn, CountingCollate)
        self.state_handle = maybe_state_handle(reader)
        self.readers = max(1, reader.num_workers)

    def begin(
        self, seed: int, position: Position, batches: int, *, padded: bool, isolated_rng: IsolatedRng | None
    ) -> tuple[Iterator[CountedBatch], Any]:
        """Begin an iteration at a position: with the stream's own state, by its skip method, or by reading up to it.

        Args:
            seed: The seed of the order.
            position: Where to begin.
            batches: The number of this reader's batches before it.
            padded: Whether short batches are padded.
            isolated_rng: The random state while batches are read; None if workers read them.

        Returns:
            The batches from there on, and the last batch that was dropped (`_NONE` if none was).
        """
        if isinstance(self.reader.collate_fn, CountingCollate):
            self.reader.collate_fn.set_padding(padded)
        restored = self._load_state(position, isolated_rng)
        skip_method = None if restored or not batches else self._maybe_skip_method()
        self._set_epoch(seed, position.epoch, skipped=batches * max(1, self.batch_size) if skip_method else 0)
        iterator = self._iterate()
        if restored or not batches:
            return iterator, _NONE
        if skip_method:
            name = _name_of(self.reader.dataset)
            logger.info("paceline resumes at batch %d of the stream %s with its %s", batches, name, skip_method)
            return iterator, _NONE
        last: Any = _NONE
        log_rereading(self.reader, f"{batches} batches", position)
        with nullcontext() if isolated_rng is None else isolated_rng():
            for _ in range(batches):
                last = next(iterator, last)
        return iterator, last

    def _load_state(self, position: Position, isolated_rng: IsolatedRng | None) -> bool:
        """Let the stream continue with its own state; return whether that is possible."""
        restored = self.state_handle is not None and self.state_handle.load(position.stream, isolated_rng)
        if isinstance(self.reader.dataset, StreamShard):
            self.reader.dataset.continues_rng = isolated_rng is not None and isolated_rng.continues
        return restored

    def _iterate(self) -> Iterator[CountedBatch]:
        direct = type(self.reader) is DataLoader and can_read_directly(self.reader)
        batches = read_directly(self.reader) if direct else iter(self.reader)
        counted = batches if self.counted else map(_uncounted, batches)
        if self.reader.num_workers:
            return counted
        memory = ReusedMemory()

        def apart(batch: CountedBatch) -> CountedBatch:
            batch.data = memory.apart(batch.data)
            return batch

        return map(apart, counted)

    def _set_epoch(self, seed: int, epoch: int, *, skipped: int) -> None:
        dataset = self.reader.dataset
        if isinstance(dataset, StreamShard):
            dataset.set_epoch_state(seed, epoch, skipped=skipped)
        else:
            set_dataset_epoch(dataset, epoch)

    def _maybe_skip_method(self) -> str | None:
        """Return the data set's skip method; with several readers the number of items each has taken is unknown."""
        dataset = self.reader.dataset
        if not isinstance(dataset, StreamShard) or self.readers > 1:
            return None
        return maybe_skip_method(dataset.dataset)

    def describe_resuming(self) -> str:
        """Describe how a position within an epoch is reached."""
        if self.state_handle is not None:
            return "resumed by its own state"
        skip_method = self._maybe_skip_method()
        return f"resumed by its {skip_method}" if skip_method else "resumed by reading again"


def _uncounted(batch: Any) -> CountedBatch:
    return CountedBatch(batch, 1, 1)


class StreamBatchSource(BatchSource):
    """Each rank reads its own part of a stream, a little ahead.

    In one exchange per chunk, which overlaps with the use of the previous chunk, the ranks tell each other how many
    samples their next batches have. If the parts of some ranks end early, those ranks continue with padding (`even`),
    all ranks stop before the first incomplete global batch (`drop_last`), or each rank stops by itself (neither). With
    several ranks, a reader without workers draws random numbers from an isolated state, so that they do not depend on
    how far ahead it reads.

    Args:
        reader: Reads this rank's batches.
        layout: How global batches are distributed; `batch_size` is 0 if unknown.
        group: The ranks.
        note: How the stream is split, for `describe`.
        length: Returns the number of batches, if the reader knows it better than its data set.
    """

    rereads = True

    def __init__(
        self,
        reader: StreamReader,
        layout: Layout,
        group: Group,
        note: str,
        *,
        length: Callable[[], int] | None = None,
    ) -> None:
        super().__init__(group)
        self._reader = reader
        self._layout = layout
        self._note = note
        self._length = length
        self._read_ahead: ReadAhead | None = None
        self.total_batch_size = layout.global_batch_size or None

    def begin(
        self, read: Callable[[], Iterator[Any]], seed: int, position: Position
    ) -> tuple[Iterator[Any], IterationProgress] | None:
        """See `BatchSource.begin`; see `StreamReader.begin` for how a position is reached."""
        reader, group, layout = self._reader, self._group, self._layout
        # Isolated, so that the stream's random numbers are the same when it is read again to resume.
        isolated_rng = None
        if not reader.reader.num_workers:
            parts = (seed, position.epoch) if group.size == 1 else (seed, position.epoch, group.rank)
            isolated_rng = IsolatedRng(mix_seed(*parts))
            if isinstance(reader.reader.dataset, StreamShard):
                reader.reader.dataset.has_isolated_rng = True
        batches, last = reader.begin(
            seed,
            position,
            position.batches,
            padded=group.size > 1 and layout.padded and layout.fill,
            isolated_rng=isolated_rng,
        )
        if group.size == 1:
            single_process = _SingleProcessIteration(batches, reader, isolated_rng, position.samples)
            return (single_process.batches(), single_process.progress) if single_process.open() else None
        self._read_ahead = ReadAhead(self._read_ahead)
        iteration = _StreamIteration(batches, last, reader, layout, group, self._read_ahead, isolated_rng)
        return (iteration.batches(), iteration.progress) if iteration.open(position.samples) else None

    @property
    def has_stream_state(self) -> bool:
        """See `BatchSource.has_stream_state`."""
        return self._reader.state_handle is not None

    @property
    def readers(self) -> int:
        """See `BatchSource.readers`."""
        return self._reader.readers

    def check(self, position: Position, *, begun: bool = False) -> None:
        """See `BatchSource.check`; also rejects a position of another number of ranks or workers."""
        saved, current = (position.ranks, position.readers), (self._group.size, self.readers)
        if position.is_within and (saved[0] not in (0, current[0]) or saved[1] not in (0, current[1])):
            raise DataError(
                f"The position in a stream was saved by {_readers_text(*saved)} and is loaded by "
                f"{_readers_text(*current)}",
                "Each reader reads its own part of the stream, and cannot continue the parts of other readers",
                "Resume with the same number of ranks and workers, or save at the end of an epoch",
            )
        super().check(position, begun=begun)

    def samples_before(self, seed: int, epoch: int, num_batches: int) -> int:
        """See `BatchSource.samples_before`; positions of batches that are not counted are in batches."""
        if not self._reader.counted:
            return num_batches * self._group.size
        return super().samples_before(seed, epoch, num_batches)

    def num_batches(self) -> int:
        """See `BatchSource.num_batches`."""
        if self._length is not None:
            return self._length()
        size = self.size()
        if size is None or not self._layout.batch_size:
            raise TypeError("this stream has no length: the number of its batches is unknown")
        layout = self._layout
        if layout.num_ranks == 1 or layout.padded or layout.drop_last:
            return layout.num_batches(size, self._group.rank)
        # Each rank ends by itself, and readers take the items in turn.
        own = -(-max(0, size - self._group.rank) // layout.num_ranks)
        return -(-own // layout.batch_size)

    def may_differ_from_length(self, samples: int) -> bool:
        """See `BatchSource.may_differ_from_length`; each reader may have a short last batch of its own."""
        size, layout = self.size(), self._layout
        if size is None or not self._reader.counted:
            return False
        if layout.num_ranks > 1 and not layout.padded and not layout.drop_last:
            # This rank does not know what the others have read after its own end.
            return True
        droppable = layout.global_batch_size * self.readers if layout.drop_last else 0
        return 0 <= size - samples <= droppable

    def size(self) -> int | None:
        """See `BatchSource.size`."""
        dataset = self._reader.reader.dataset
        return maybe_length(dataset.dataset if isinstance(dataset, StreamShard) else dataset)

    def describe(self, seed: int) -> str:
        """See `BatchSource.describe`."""
        return (
            f"{self._note}, {batch_text(self.total_batch_size, self._group.size)}, {self._reader.describe_resuming()} "
            "within an epoch"
        )


class _SingleProcessProgress(IterationProgress):
    """Progress of a single process that reads ahead.

    Args:
        samples: Position at which the iteration begins.
        counted: Whether batches are counted in samples.
    """

    def __init__(self, samples: int, *, counted: bool) -> None:
        super().__init__()
        self._samples = samples
        self._counted = counted
        self._recorded: deque[tuple[int, bool, dict[str, Any] | None]] = deque()
        self._real = 0
        self._is_last = False
        self._stream: dict[str, Any] | None = None
        # Adds a batch that will be yielded: its samples, whether it is the last, the state of the stream after it.
        self.record = self._recorded.append

    def advance(self) -> None:
        """See `IterationProgress.advance`."""
        self._real, self._is_last, self._stream = self._recorded.popleft()
        self._samples += self._real
        self.num_yielded += 1

    def _counts(self) -> BatchCounts:
        return BatchCounts(rows=(self._real,), real=(self._real,), counted=self._counted)

    @property
    def samples(self) -> int:
        """See `IterationProgress.samples`."""
        return self._samples

    @property
    def stream(self) -> dict[str, Any] | None:
        """See `IterationProgress.stream`."""
        return self._stream

    @property
    def remaining(self) -> int | None:
        """See `IterationProgress.remaining`: 0 or None."""
        return 0 if self._is_last else None

    @property
    def ended(self) -> bool:
        """See `IterationProgress.ended`."""
        return self._is_last


class _SingleProcessIteration:
    """One iteration over a stream in a single process.

    Args:
        batches: The batches, from the position on.
        reader: Where they come from.
        isolated_rng: The random state while batches are read; None if workers read them.
        samples: Position at which the iteration begins.
    """

    def __init__(
        self, batches: Iterator[CountedBatch], reader: StreamReader, isolated_rng: IsolatedRng | None, samples: int
    ) -> None:
        self._batches = batches
        self._state_handle = reader.state_handle
        self._isolated_rng = isolated_rng
        # Batches that were not yielded yet, each with the state of the stream after it.
        self._read: deque[tuple[CountedBatch, dict[str, Any] | None]] = deque()
        self._ended = False
        self.progress = _SingleProcessProgress(samples, counted=reader.counted)

    def open(self) -> bool:
        """Read the first batches; return whether there is one."""
        self._read_ahead()
        if self._read and isinstance(failure := self._read[0][0].data, _Failure):
            raise failure.error
        return bool(self._read)

    def batches(self) -> Iterator[Any]:
        """Yield the batches, each after the next one was read."""
        read, record = self._read, self.progress.record
        while read:
            if len(read) < 2 and not self._ended:
                self._read_ahead()
            batch, state = read.popleft()
            if isinstance(batch.data, _Failure):
                raise batch.data.error
            record((batch.real, not read, state))
            yield batch.data

    def _read_ahead(self) -> None:
        """Read until the batch after the next one is known."""
        if self._isolated_rng is None:
            # Workers only keep reading while a batch is used if one of theirs is taken for each batch used.
            while len(self._read) < 2 and not self._ended:
                self._read_one()
            return
        began = time.perf_counter()
        with self._isolated_rng():
            while not self._ended and (
                len(self._read) < 2
                or (len(self._read) < MAX_READ_AHEAD and time.perf_counter() - began < READ_AHEAD_SECONDS)
            ):
                self._read_one()

    def _read_one(self) -> None:
        try:
            batch = next(self._batches, None)
        except Exception as error:
            # Batches that were read before the failure are used first.
            batch = CountedBatch(_Failure(error), 0, 0)
            self._ended = True
        if batch is None:
            self._ended = True
            return
        state = None if self._state_handle is None or self._ended else self._state_handle.read()
        self._read.append((batch, state))


class _StreamIteration:
    """One iteration over a stream on this rank, among several.

    Args:
        batches: This rank's own batches.
        last: The batch that was read last before them, `_NONE` if there is none.
        reader: Where they come from.
        layout: How global batches are distributed.
        group: The ranks.
        read_ahead: How far to read ahead.
        isolated_rng: The random state while batches are read; None if workers read them.
    """

    def __init__(
        self,
        batches: Iterator[CountedBatch],
        last: Any,
        reader: StreamReader,
        layout: Layout,
        group: Group,
        read_ahead: ReadAhead,
        isolated_rng: IsolatedRng | None,
    ) -> None:
        self._batches = batches
        self._state_handle = reader.state_handle
        self._counted = reader.counted
        self._batch_size = reader.batch_size if reader.counted else 1
        self._layout = layout
        self._padded, self._drop_last = layout.padded, layout.drop_last
        self._group = group
        self._isolated_rng = isolated_rng
        self._full_counts = self._counts_of([self._batch_size] * group.size)
        # The batch that pads this rank's part once it has ended.
        self._filler: Any = last.data if isinstance(last, CountedBatch) else _NONE
        self._read: deque[CountedBatch] = deque()
        # States of the stream after each batch of `_read`, after the last batch read, and after the last one announced.
        self._states: deque[dict[str, Any] | None] = deque()
        self._state: dict[str, Any] | None = None
        self._announced_state: dict[str, Any] | None = None
        self._ended = False
        # How many of the last batches of `_read` the other ranks do not know about.
        self._unannounced = 0
        self._chunk_size = 1
        self._read_ahead = read_ahead
        self._num_yielded = self._yielded_at_last_start = 0
        self._pending: Pending | None = None
        # Chunks that the ranks have agreed on and that were not begun.
        self._agreed: deque[Chunk] = deque()
        # Whether the ranks exchange nothing more: this iteration has ended, or some rank has left it.
        self._exchanges_done = False
        self._continues_by_itself = False
        self._others_end = True
        self.progress: ChunkProgress

    def open(self, samples: int) -> bool:
        """Agree on the first global batch; return whether there is one."""
        self.progress = ChunkProgress(samples, self._has_more, lambda: self._others_end)
        self._start_exchange()
        return self._finish_exchange(opening=True)

    def batches(self) -> Iterator[Any]:
        """Yield this rank's batches."""
        read = self._read
        while self._agreed:
            chunk = self._agreed.popleft()
            half = -1 if self._exchanges_done else chunk.num_batches // 2
            for index in range(chunk.num_batches):
                if index == half:
                    self._start_exchange(self._num_yielded + index)
                elif self._isolated_rng is None and self._unannounced < self._chunk_size:
                    # Workers only keep reading while a batch is used if one of theirs is taken for each batch used.
                    self._fill(self._unannounced + 1)
                yield self._next() if self._ended else read.popleft().data
            self._num_yielded += chunk.num_batches
            self._has_more()
        if self._continues_by_itself:
            yield from self._rest()

    def _rest(self) -> Iterator[Any]:
        """Yield the rest of this rank's part after another rank has left; the counts then cover this rank only."""
        while self._fill(1):
            counts = [0] * self._group.size
            counts[self._group.rank] = self._read[0].real
            self._unannounced -= 1
            self.progress.add(Chunk(1, self._counts_of(counts), self._states_of(1)))
            batch = self._next()
            self._fill(1)
            yield batch

    def _has_more(self) -> bool:
        """Say whether this rank gets a batch after those of all chunks; wait for the other ranks if necessary."""
        if self._pending is not None:
            self._finish_exchange()
        return bool(self._agreed) or (self._continues_by_itself and self._fill(1))

    def _fill(self, wanted: int) -> bool:
        """Read until there are `wanted` unannounced batches, or until the end; return whether there are that many."""
        if self._unannounced < wanted and not self._ended:
            before = len(self._read)
            with nullcontext() if self._isolated_rng is None else self._isolated_rng():
                self._read_batches(wanted - self._unannounced)
            self._unannounced += len(self._read) - before
        return self._unannounced >= wanted

    def _read_batches(self, number: int) -> None:
        batches, state_handle, add = self._batches, self._state_handle, self._read.append
        try:
            for batch in islice(batches, number):
                add(batch)
                number -= 1
                if state_handle is not None:
                    self._state = state_handle.read()
                    self._states.append(self._state)
        except Exception as error:
            # Batches read before the failure are used first; the other ranks continue as if this were another batch.
            add(CountedBatch(_Failure(error), self._batch_size, self._batch_size))
            self._states.append(self._state)
        self._ended = number > 0

    def _next(self) -> Any:
        """Take the next batch, or padding."""
        if not self._read:
            return copy.deepcopy(self._filler)
        batch = self._read.popleft().data
        if isinstance(batch, _Failure):
            raise batch.error
        if self._ended and self._padded and not self._read:
            # Copied, because the script may modify the batch.
            self._filler = copy.deepcopy(batch)
        return batch

    def _start_exchange(self, num_yielded: int = 0) -> None:
        """Read what the next chunk still lacks, and begin to announce this rank's batches to the others.

        Args:
            num_yielded: Batches yielded so far.
        """
        self._fill(self._chunk_size)
        unannounced = islice(self._read, len(self._read) - self._unannounced, None)
        announced = list(unannounced)[: self._chunk_size]
        self._unannounced -= len(announced)
        example = announced[-1].data if announced else None
        next_size = self._read_ahead.next_size(num_yielded - self._yielded_at_last_start, example)
        self._yielded_at_last_start = num_yielded
        real = [batch.real for batch in announced]
        message = np.zeros(HEADER_LENGTH + self._chunk_size, dtype=np.int64)
        message[:HEADER_LENGTH] = (next_size, len(announced), real.count(self._batch_size) == len(real))
        message[HEADER_LENGTH : HEADER_LENGTH + len(real)] = real
        before = time.perf_counter()
        self._pending = self._group.start_all_gather(torch.from_numpy(message))
        self._read_ahead.exchange_seconds = time.perf_counter() - before

    def _finish_exchange(self, *, opening: bool = False) -> bool:
        """Receive what the others announce, and add the next chunk; return whether any rank gets a batch of it."""
        table = self._receive()
        chunk_size = self._chunk_size
        headers = table[:, :HEADER_LENGTH].tolist()
        self._chunk_size = min(next_size for next_size, _, _ in headers)
        announced = [number for _, number, _ in headers]
        fewest, most, local = min(announced), max(announced), announced[self._group.rank]
        if self._padded and opening and most and not fewest:
            self._take_filler(announced)
        num_batches = self._agree(announced, chunk_size)
        if num_batches:
            all_full = fewest >= num_batches and all(full for _, _, full in headers)
            samples = table[:, HEADER_LENGTH : HEADER_LENGTH + num_batches]
            counts = self._full_counts if all_full else self._counts_in(samples, fewest)
            chunk = Chunk(num_batches, counts, self._states_of(local, num_batches))
            self.progress.add(chunk)
            self._agreed.append(chunk)
        return bool(num_batches if self._drop_last else most)

    def _receive(self) -> torch.Tensor:
        """Wait for the messages of all ranks, [ranks, numbers]."""
        assert self._pending is not None
        before = time.perf_counter()
        table = self._pending.wait()
        self._read_ahead.exchange_seconds += time.perf_counter() - before
        self._pending = None
        return table

    def _agree(self, announced: list[int], chunk_size: int) -> int:
        """Return how many batches this rank gets of a chunk, and note what follows it.

        Args:
            announced: Batches that each rank has, up to `chunk_size`; a rank with fewer has reached its end.
            chunk_size: How many global batches the chunk can have.
        """
        fewest, most, local = min(announced), max(announced), announced[self._group.rank]
        if self._padded:
            self._exchanges_done = most < chunk_size
            return most
        self._exchanges_done = fewest < chunk_size
        if self._drop_last:
            return fewest
        self._continues_by_itself = self._exchanges_done and local == chunk_size
        self._others_end = most == local
        return local

    def _counts_in(self, samples: torch.Tensor, fewest: int) -> list[BatchCounts]:
        """Return the counts of each global batch of a chunk.

        Args:
            samples: Samples of each batch, [ranks, global batches].
            fewest: How many of the global batches have a batch of every rank.
        """
        counts = []
        for index, real in enumerate(samples.t().tolist()):
            if index > fewest and not self._padded:
                # After the first global batch that some rank lacks, this rank knows only its own batches.
                real = [number if rank == self._group.rank else 0 for rank, number in enumerate(real)]
            counts.append(self._counts_of(real))
        return counts

    def _counts_of(self, real: list[int]) -> BatchCounts:
        rows = tuple(real)
        if self._padded and self._layout.fill:
            rows = (self._batch_size,) * len(real)
        elif self._padded:
            # Short batches stay short; a rank without a batch gets a whole one as padding.
            rows = tuple(number or self._batch_size for number in real)
        return BatchCounts(rows=rows, real=tuple(real), counted=self._counted)

    def _states_of(self, local: int, num_batches: int = 1) -> list[dict[str, Any] | None] | None:
        """Take the states after this rank's next `local` batches; padding does not change the state."""
        if self._state_handle is None:
            return None
        states = [self._states.popleft() for _ in range(local)]
        if states:
            self._announced_state = states[-1]
        return [*states, *[self._announced_state] * (num_batches - local)][:num_batches]

    def _take_filler(self, announced: list[int]) -> None:
        """Give ranks without any batch one of another rank, as padding."""
        source = next(rank for rank, number in enumerate(announced) if number)
        filler = self._group.broadcast_object(self._read[0].data if self._read else None, source)
        if self._filler is _NONE and not self._read:
            self._filler = filler


class _Failure:
    """Stands for a batch that could not be read."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def log_rereading(reader: DataLoader[Any], amount: str, position: Position) -> None:
    """Log that a stream is read up to a position, and how to avoid it."""
    dataset = reader.dataset
    hint = "a state_dict and load_state_dict of its own, or a skip(n), would avoid that"
    if isinstance(dataset, StatefulShard):
        hint = "use_stateful_dataloader=True would save the position of its workers instead"
    logger.info(
        "paceline reads and drops %s of the stream %s to resume at sample %d of epoch %d; %s",
        amount, _name_of(dataset), position.samples, position.epoch, hint,
    )  # fmt: skip


def _name_of(dataset: Any) -> str:
    return type(dataset.dataset if isinstance(dataset, StreamShard) else dataset).__name__


def _readers_text(ranks: int, readers: int) -> str:
    return counted(ranks, "rank") + (f" x {readers} readers" if readers > 1 else "")
