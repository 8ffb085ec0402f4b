"""Reads batches whose number is not known before they are read, and lets ranks agree on the end."""

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

from paceline.collectives import BatchCounts
from paceline.data.counting import CountedBatch, CountingCollate
from paceline.data.epochs import set_dataset_epoch
from paceline.data.progress import Progress
from paceline.data.randomness import PrivateRandomness, kept_randomness, mix_seed
from paceline.data.read_ahead import Chunk, ChunkProgress, ReadAhead
from paceline.data.reading import Reading, batch_text
from paceline.data.stateful import StatefulShard, keeper_of
from paceline.data.worker_split import StreamShard, way_to_skip
from paceline.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from torch.utils.data import DataLoader

    from paceline.collectives import Group, Pending
    from paceline.data.plan import Layout
    from paceline.data.reading import Position
    from paceline.data.stateful import StreamKeeper

__all__ = ["StreamReading", "StreamSource"]

logger = logging.getLogger(__name__)

_NONE: Any = object()

# What a rank says before the samples of each of its batches: how many global batches it would like to read next, how
# many batches it has for this chunk, and whether all of those are full.
HEAD = 3


class StreamSource:
    """Where the batches of a stream come from: a reader, begun at a position.

    Args:
        reader: Yields this rank's batches on the host.
        rows: Samples in a whole batch, where the reader counts them; 0 where its batches are taken whole.
    """

    def __init__(self, reader: DataLoader[Any], rows: int) -> None:
        self.reader = reader
        self.rows = rows
        self.counted = isinstance(reader.collate_fn, CountingCollate)
        self.keeper = keeper_of(reader)
        self.readers = max(1, reader.num_workers)

    def begin(
        self, seed: int, position: Position, batches: int, *, padded: bool, randomness: AbstractContextManager[Any]
    ) -> tuple[Iterator[CountedBatch], Any]:
        """Begin a pass at a position; return the batches from there on, and the last one that was read to get there.

        Args:
            seed: Of the order.
            position: Where to begin.
            batches: How many batches of this reader come before it.
            padded: Whether short batches are completed.
            randomness: Where random numbers come from while batches are dropped.
        """
        dataset, state = self.reader.dataset, position.stream
        if isinstance(self.reader.collate_fn, CountingCollate):
            self.reader.collate_fn.complete(padded)
        restored = self.keeper is not None and self.keeper.load(state)
        way = None if restored or not batches else self._way_to_skip()
        if not isinstance(dataset, StreamShard):
            set_dataset_epoch(dataset, position.epoch)
        else:
            dataset.reach(seed, position.epoch, skipped=batches * max(1, self.rows) if way else 0)
        found = iter(self.reader) if self.counted else map(_whole, self.reader)
        last: Any = _NONE
        if batches and way:
            logger.info("paceline goes on at batch %d of the stream %s by its %s", batches, _name_of(dataset), way)
        elif batches and not restored:
            say_rereading(self.reader, f"{batches} batches", position)
            with randomness:
                for _ in range(batches):
                    last = next(found, last)
        return found, last

    def _way_to_skip(self) -> str | None:
        """Name the method of the data set that leads to a position; only one reader knows how many items it took."""
        dataset = self.reader.dataset
        single = isinstance(dataset, StreamShard) and self.readers == 1
        return way_to_skip(dataset.dataset) if single else None  # type: ignore[attr-defined]

    def resumes_by(self) -> str:
        """Say how a position within an epoch is reached."""
        if self.keeper is not None:
            return "resumed by its own state"
        way = self._way_to_skip()
        return f"resumed by its {way}" if way else "resumed by reading again"


def _whole(batch: Any) -> CountedBatch:
    return CountedBatch(batch, 1, 1)


class StreamReading(Reading):
    """Each rank reads its own part of a stream, a little ahead.

    The ranks tell each other how many samples are in the batches of the next chunk, in one exchange that goes on while
    those before are used. Ranks whose part ends early go on with padding (`even`), all stop before the first incomplete
    round (`drop_last`), or each stops by itself (neither). What a reader without workers draws at random is its own
    where there are several ranks, so that it does not depend on how far ahead it reads.

    Args:
        source: Where this rank's batches come from.
        layout: `rows` is 0 where the size of batches is not known.
        group: The ranks.
        note: How the stream is split, for `describe`.
        length: Tells the number of batches, where the reader knows better than its data set.
    """

    rereads = True

    def __init__(
        self,
        source: StreamSource,
        layout: Layout,
        group: Group,
        note: str,
        *,
        length: Callable[[], int] | None = None,
    ) -> None:
        super().__init__(group)
        self._source = source
        self._layout = layout
        self._note = note
        self._length = length
        self.total_batch_size = layout.global_rows or None

    def begin(
        self, read: Callable[[], Iterator[Any]], seed: int, position: Position
    ) -> tuple[Iterator[Any], Progress] | None:
        """See `Reading.begin`; a position is reached by the stream's own state, by skipping, or by reading up to it."""
        source, group, layout = self._source, self._group, self._layout
        if group.size == 1:
            batches, _ = source.begin(seed, position, position.batches, padded=False, randomness=kept_randomness())
            return _begun_alone(batches, source, position)
        private = None
        if not source.reader.num_workers:
            private = PrivateRandomness(mix_seed(seed, position.epoch, group.rank))
            if isinstance(source.reader.dataset, StreamShard):
                source.reader.dataset.alone = True
        around = nullcontext() if private is None else private()
        batches, last = source.begin(
            seed, position, position.batches, padded=layout.padded and layout.fill, randomness=around
        )
        run = _Run(batches, last, source, layout, group, private)
        return (run.batches(), run.progress) if run.open(position.samples) else None

    @property
    def keeps_state(self) -> bool:
        """See `Reading.keeps_state`."""
        return self._source.keeper is not None

    @property
    def readers(self) -> int:
        """See `Reading.readers`."""
        return self._source.readers

    def check(self, position: Position, *, begun: bool = False) -> None:
        """See `Reading.check`; also refuses a position of other ranks, or other workers."""
        then, now = (position.ranks, position.readers), (self._group.size, self.readers)
        if position.is_within and (then[0] not in (0, now[0]) or then[1] not in (0, now[1])):
            raise DataError(
                f"The position in a stream was saved by {_readers_text(*then)} and is loaded by {_readers_text(*now)}",
                "Each reader reads its own part, so that parts of other readers cannot be gone on with",
                "Resume with the same ranks and workers, or save at the end of a pass",
            )
        super().check(position, begun=begun)

    def samples_before(self, seed: int, epoch: int, rounds: int) -> int:
        """See `Reading.samples_before`; batches that nobody counts are the unit themselves."""
        if not self._source.counted:
            return rounds * self._group.size
        return super().samples_before(seed, epoch, rounds)

    def num_batches(self) -> int:
        """See `Reading.num_batches`."""
        if self._length is not None:
            return self._length()
        size = self.size()
        if size is None or not self._layout.rows:
            raise TypeError("this stream does not tell how many batches it yields")
        return self._layout.num_batches(size, self._group.rank)

    def size(self) -> int | None:
        """See `Reading.size`."""
        dataset = self._source.reader.dataset
        try:
            return len(dataset.dataset if isinstance(dataset, StreamShard) else dataset)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            return None

    def describe(self, seed: int) -> str:
        """See `Reading.describe`."""
        return (
            f"{self._note}, {batch_text(self.total_batch_size, self._group.size)}, {self._source.resumes_by()} "
            "within an epoch"
        )


class _SingleProgress(Progress):
    """Progress of a rank that is alone and has read one batch ahead.

    Args:
        samples: Position at which the pass begins.
        counted: Whether batches are counted in samples.
    """

    def __init__(self, samples: int, *, counted: bool) -> None:
        super().__init__()
        self._samples = samples
        self._counted = counted
        self._waiting: deque[tuple[int, bool, dict[str, Any] | None]] = deque()
        self._real = 0
        self._last = False
        self._stream: dict[str, Any] | None = None
        # Notes a batch that will be handed out: its samples, whether it is the last, the state of the stream after it.
        self.record = self._waiting.append

    def hand_out(self) -> None:
        """See `Progress.hand_out`."""
        self._real, self._last, self._stream = self._waiting.popleft()
        self._samples += self._real
        self.handed += 1

    def _counts(self) -> BatchCounts:
        return BatchCounts(rows=(self._real,), real=(self._real,), counted=self._counted)

    @property
    def samples(self) -> int:
        """See `Progress.samples`."""
        return self._samples

    @property
    def stream(self) -> dict[str, Any] | None:
        """See `Progress.stream`."""
        return self._stream

    @property
    def remaining(self) -> int | None:
        """See `Progress.remaining`: 0 or None."""
        return 0 if self._last else None

    @property
    def ended(self) -> bool:
        """See `Progress.ended`."""
        return self._last


def _begun_alone(
    batches: Iterator[CountedBatch], source: StreamSource, position: Position
) -> tuple[Iterator[Any], Progress] | None:
    first = next(batches, None)
    if first is None:
        return None
    progress = _SingleProgress(position.samples, counted=source.counted)
    return _one_ahead(first, batches, source.keeper, progress), progress


def _one_ahead(
    batch: CountedBatch, batches: Iterator[CountedBatch], keeper: StreamKeeper | None, progress: _SingleProgress
) -> Iterator[Any]:
    record = progress.record
    following: CountedBatch | None = batch
    state, failure = None, None
    while following is not None:
        batch = following
        if keeper is not None:
            # Before the batch after this one is read.
            state = keeper.read()
        try:
            following = next(batches, None)
        except Exception as error:
            failure = error
        if failure is not None:
            # What was read before the failure is used before it.
            record((batch.real, False, state))
            yield batch.data
            raise failure
        record((batch.real, following is None, state))
        yield batch.data


class _Run:
    """One pass over a stream on this rank, among several.

    Args:
        batches: This rank's own.
        last: The batch before them that was read last, `_NONE` if there is none.
        source: Where they come from.
        layout: How global batches are dealt out.
        group: The ranks.
        private: What is drawn at random while batches are read, where that is not done by workers.
    """

    def __init__(
        self,
        batches: Iterator[CountedBatch],
        last: Any,
        source: StreamSource,
        layout: Layout,
        group: Group,
        private: PrivateRandomness | None,
    ) -> None:
        self._batches = batches
        self._keeper = source.keeper
        self._counted = source.counted
        self._rows = source.rows if source.counted else 1
        self._layout = layout
        self._padded, self._drop_last = layout.padded, layout.drop_last
        self._group = group
        self._private = private
        self._full = self._counts_of([self._rows] * group.size)
        # What pads this rank's part once it has ended.
        self._filler: Any = last.data if isinstance(last, CountedBatch) else _NONE
        self._read: deque[CountedBatch] = deque()
        self._states: deque[dict[str, Any] | None] = deque()
        self._state: dict[str, Any] | None = None
        self._state_told: dict[str, Any] | None = None
        self._ended = False
        # Batches of `_read` that the other ranks do not know of, the last ones.
        self._untold = 0
        self._size = 1
        self._ahead = ReadAhead()
        self._given = self._given_before = 0
        self._pending: Pending | None = None
        # Chunks that are agreed on and not begun.
        self._agreed: deque[Chunk] = deque()
        # Whether the ranks exchange nothing any more: this pass has ended, or some rank has left it.
        self._settled = False
        self._goes_on_alone = False
        self._others_end = True
        self.progress: ChunkProgress

    def open(self, samples: int) -> bool:
        """Agree on the first global batch; return whether there is one."""
        self.progress = ChunkProgress(samples, self._more, lambda: self._others_end)
        self._start()
        return self._agree(opening=True)

    def batches(self) -> Iterator[Any]:
        """Yield this rank's batches."""
        read = self._read
        while self._agreed:
            chunk = self._agreed.popleft()
            half = -1 if self._settled else chunk.rounds // 2
            for index in range(chunk.rounds):
                if index == half:
                    self._start(self._given + index)
                elif self._private is None and self._untold < self._size:
                    # Workers read on while a batch is used, as long as one is taken off them for each.
                    self._fill(self._untold + 1)
                yield self._next() if self._ended else read.popleft().data
            self._given += chunk.rounds
            self._more()
        if self._goes_on_alone:
            yield from self._by_itself()

    def _by_itself(self) -> Iterator[Any]:
        """Yield what is left of this rank's part after another rank has left; it knows of itself only."""
        while self._fill(1):
            counts = [0] * self._group.size
            counts[self._group.rank] = self._read[0].real
            self._untold -= 1
            self.progress.add(Chunk(1, self._counts_of(counts), self._states_of(1)))
            batch = self._next()
            self._fill(1)
            yield batch

    def _more(self) -> bool:
        """Say whether this rank gets a batch after those of all chunks; wait for the others if they have to say."""
        if self._pending is not None:
            self._agree()
        return bool(self._agreed) or (self._goes_on_alone and self._fill(1))

    def _fill(self, wanted: int) -> bool:
        """Read until the ranks do not know of `wanted` batches, or until the end; return whether there are so many."""
        if self._untold < wanted and not self._ended:
            before = len(self._read)
            with nullcontext() if self._private is None else self._private():
                self._read_on(wanted - self._untold)
            self._untold += len(self._read) - before
        return self._untold >= wanted

    def _read_on(self, number: int) -> None:
        batches, keeper, add = self._batches, self._keeper, self._read.append
        try:
            for batch in islice(batches, number):
                add(batch)
                number -= 1
                if keeper is not None:
                    self._state = keeper.read()
                    self._states.append(self._state)
        except Exception as error:
            # What was read before it is used before it; the others go on as if this rank had read another batch.
            add(CountedBatch(_Failure(error), self._rows, self._rows))
            self._states.append(self._state)
        self._ended = number > 0

    def _next(self) -> Any:
        """Take the next batch, or pad."""
        if not self._read:
            return copy.deepcopy(self._filler)
        batch = self._read.popleft().data
        if isinstance(batch, _Failure):
            raise batch.error
        if self._ended and self._padded and not self._read:
            # A copy: the user may change the batch that he gets.
            self._filler = copy.deepcopy(batch)
        return batch

    def _start(self, given: int = 0) -> None:
        """Read what the next chunk still lacks, and start to tell the others what this rank has.

        Args:
            given: Batches handed out so far.
        """
        self._fill(self._size)
        told = list(islice(self._read, len(self._read) - self._untold, None))[: self._size]
        self._untold -= len(told)
        example = told[-1].data if told else None
        wanted = self._ahead.next_size(given - self._given_before, example)
        self._given_before = given
        real = [batch.real for batch in told]
        message = np.zeros(HEAD + self._size, dtype=np.int64)
        message[:HEAD] = (wanted, len(told), real.count(self._rows) == len(real))
        message[HEAD : HEAD + len(real)] = real
        before = time.perf_counter()
        self._pending = self._group.start_all_gather(torch.from_numpy(message))
        self._ahead.spent = time.perf_counter() - before

    def _agree(self, *, opening: bool = False) -> bool:
        """Wait for what the others have, and note the next chunk; return whether any rank gets a batch of it."""
        assert self._pending is not None
        before = time.perf_counter()
        table = self._pending.wait()
        self._ahead.spent += time.perf_counter() - before
        self._pending = None
        size = self._size
        heads = table[:, :HEAD].tolist()
        self._size = min(wanted for wanted, _, _ in heads)
        told = [number for _, number, _ in heads]
        least, most, mine = min(told), max(told), told[self._group.rank]
        if self._padded:
            rounds, self._settled = most, most < size
            if opening and most and not least:
                self._take_filler(told)
        elif self._drop_last:
            rounds, self._settled = least, least < size
        else:
            rounds, self._settled = mine, least < size
            self._goes_on_alone = self._settled and mine == size
            self._others_end = most == mine
        if rounds:
            full = least >= rounds and all(full for _, _, full in heads)
            counts = self._full if full else self._counts_in(table[:, HEAD : HEAD + rounds], least)
            chunk = Chunk(rounds, counts, self._states_of(mine, rounds))
            self.progress.add(chunk)
            self._agreed.append(chunk)
        return bool(rounds if self._drop_last else most)

    def _counts_in(self, table: torch.Tensor, least: int) -> list[BatchCounts]:
        """Return the counts of each global batch of a chunk.

        Args:
            table: Samples, [ranks, rounds].
            least: How many rounds every rank has.
        """
        found = []
        for index, real in enumerate(table.t().tolist()):
            if index > least and not self._padded:
                # After the first round that some rank has left, this one knows of itself only.
                real = [n if rank == self._group.rank else 0 for rank, n in enumerate(real)]
            found.append(self._counts_of(real))
        return found

    def _counts_of(self, real: list[int]) -> BatchCounts:
        rows = tuple(real)
        if self._padded and self._layout.fill:
            rows = (self._rows,) * len(real)
        elif self._padded:
            # Short batches stay short; a rank that has none left holds a whole one that is not its own.
            rows = tuple(n or self._rows for n in real)
        return BatchCounts(rows=rows, real=tuple(real), counted=self._counted)

    def _states_of(self, mine: int, rounds: int = 1) -> list[dict[str, Any] | None] | None:
        """Take the states after this rank's next batches; padding does not move the stream."""
        if self._keeper is None:
            return None
        states = [self._states.popleft() for _ in range(mine)]
        if states:
            self._state_told = states[-1]
        return [*states, *[self._state_told] * (rounds - mine)][:rounds]

    def _take_filler(self, told: list[int]) -> None:
        """Give ranks that have nothing at all the batch of a rank that has one, to pad with."""
        source = next(rank for rank, number in enumerate(told) if number)
        filler = self._group.broadcast_object(self._read[0].data if self._read else None, source)
        if self._filler is _NONE and not self._read:
            self._filler = filler


class _Failure:
    """Takes the place of a batch that could not be read."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def say_rereading(reader: DataLoader[Any], amount: str, position: Position) -> None:
    """Say in one line that a stream is read up to a position, and what would spare that."""
    dataset = reader.dataset
    logger.info(
        "paceline reads and drops %s of the stream %s to go on at sample %d of epoch %d; %s",
        amount, _name_of(dataset), position.samples, position.epoch,
        "use_stateful_dataloader=True would save where its workers are" if isinstance(dataset, StatefulShard)
        else "a state_dict and load_state_dict of its own, or a skip(n), would spare that",
    )  # fmt: skip


def _name_of(dataset: Any) -> str:
    return type(dataset.dataset if isinstance(dataset, StreamShard) else dataset).__name__


def _readers_text(ranks: int, readers: int) -> str:
    return f"{ranks} {'rank' if ranks == 1 else 'ranks'}" + (f" x {readers} readers" if readers > 1 else "")
