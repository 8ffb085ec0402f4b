"""Reads batches whose number is not known before they are read, and lets ranks agree on the end."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from paceline.collectives import BatchCounts
from paceline.data.epochs import set_dataset_epoch
from paceline.data.progress import Progress, RecordedProgress, Round
from paceline.data.randomness import kept_randomness
from paceline.data.reading import Reading, batch_text
from paceline.data.rows import complete, num_rows
from paceline.data.stateful import StatefulShard, keeper_of
from paceline.data.worker_split import StreamShard
from paceline.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.utils.data import DataLoader

    from paceline.collectives import Group, Pending
    from paceline.data.plan import Layout
    from paceline.data.reading import Position
    from paceline.data.stateful import StreamKeeper

__all__ = ["Agreement", "StreamReading", "reach", "say_rereading"]

logger = logging.getLogger(__name__)

_NONE: Any = object()


class Agreement:
    """What the ranks have read for one round: rows handed out and rows that are real.

    Ranks that are not together any more know of themselves only and put 0 for the others.
    """

    def __init__(self, rows: int, real: int, group: Group, *, together: bool) -> None:
        self._counts: BatchCounts | None = None
        self._pending: Pending | None = None
        if together:
            self._pending = group.start_all_gather(torch.tensor([rows, real]))
        else:
            before, after = (0,) * group.rank, (0,) * (group.size - group.rank - 1)
            self._counts = BatchCounts(rows=(*before, rows, *after), real=(*before, real, *after))

    def counts(self) -> BatchCounts:
        """Return the counts of all ranks, waiting for those that are still reading."""
        if self._counts is None:
            assert self._pending is not None
            rows, real = self._pending.wait().t().tolist()
            self._counts = BatchCounts(rows=tuple(rows), real=tuple(real))
        return self._counts

    def revise(self, counts: BatchCounts) -> None:
        """Replace what was agreed on, alike on all ranks."""
        self._counts = counts


class StreamReading(Reading):
    """Each rank reads its own part of a stream, one batch ahead.

    One exchange of two numbers per batch, started when the next batch has been read and waited for when that
    one is due, tells every rank how many rows each has. Ranks whose part ends early go on with padding
    (`even`), all stop before the first incomplete round (`drop_last`), or each stops by itself (neither).

    Args:
        reader: Yields this rank's batches on the host.
        layout: `rows` is 0 where the size of batches is not known.
        group: The ranks.
        note: How the stream is split, for `describe`.
        length: Tells the number of batches, where the reader knows better than its data set.
    """

    rereads = True

    def __init__(
        self,
        reader: DataLoader[Any],
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
        self._keeper = keeper_of(reader)
        self.total_batch_size = layout.global_rows or None

    def begin(
        self, read: Callable[[], Iterator[Any]], seed: int, position: Position
    ) -> tuple[Iterator[Any], Progress] | None:
        """See `Reading.begin`; a position is reached by the stream's own state, or by reading up to it."""
        reach(self._reader.dataset, seed, position.epoch)
        restored = self._keeper is not None and self._keeper.load(position.stream)
        run = _Run(iter(self._reader), self._layout, self._group, self._keeper)
        if position.batches and not restored:
            say_rereading(self._reader, f"{position.batches} batches", position)
            with kept_randomness():
                run.skip(position.batches)
        if not run.open():
            return None
        progress = RecordedProgress(position.samples)
        return run.batches(progress, position.samples), progress

    @property
    def keeps_state(self) -> bool:
        """See `Reading.keeps_state`."""
        return self._keeper is not None

    @property
    def readers(self) -> int:
        """See `Reading.readers`."""
        return max(1, self._reader.num_workers)

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
        dataset = self._reader.dataset
        try:
            return len(dataset.dataset if isinstance(dataset, StreamShard) else dataset)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            return None

    def describe(self, seed: int) -> str:
        """See `Reading.describe`."""
        return f"{self._note}, {batch_text(self.total_batch_size, self._group.size)}"


class _Run:
    """One pass over a stream on this rank."""

    def __init__(self, source: Iterator[Any], layout: Layout, group: Group, keeper: StreamKeeper | None) -> None:
        self._keeper = keeper
        self._state: dict[str, Any] | None = None
        self._ended = False
        self._source = source
        self._layout = layout
        self._group = group
        self._together = group.size > 1
        self._filler: Any = _NONE
        self._batch: Any = _NONE
        self._agreement: Agreement

    def skip(self, batches: int) -> None:
        for _ in range(batches):
            self._filler = next(self._source, self._filler)

    def open(self) -> bool:
        """Read the first round; return whether there is one."""
        self._read()
        counts = self._agreement.counts()
        if self._ends_at(counts):
            return False
        if self._layout.padded and 0 in counts.rows:
            self._take_filler(counts)
        return True

    def batches(self, progress: RecordedProgress, samples: int) -> Iterator[Any]:
        while True:
            counts, batch = self._agreement.counts(), self._batch
            if self._ends_at(counts) or not counts.rows[self._group.rank]:
                return
            if 0 in counts.rows:
                # Some rank has left; those that go on cannot exchange any more.
                self._together = False
            samples += sum(counts.real)
            if self._keeper is not None and not self._ended:
                # Before the batch after this one is read.
                self._state = self._keeper.read()
            state = self._state
            self._read()
            progress.record(Round(counts, samples, self._is_last(self._agreement), self._ends(self._agreement), state))
            yield batch

    def _is_last(self, following: Agreement) -> Callable[[], bool]:
        def is_last() -> bool:
            counts = following.counts()
            return self._ends_at(counts) or not counts.rows[self._group.rank]

        return is_last

    def _ends(self, following: Agreement) -> Callable[[], bool]:
        return lambda: self._ends_at(following.counts())

    def _ends_at(self, counts: BatchCounts) -> bool:
        if not any(counts.real):
            return True
        return self._layout.drop_last and any(real < max(1, self._layout.rows) for real in counts.real)

    def _take_filler(self, counts: BatchCounts) -> None:
        """Give ranks that have nothing at all the batch of a rank that has one, to pad with."""
        source = next(rank for rank, real in enumerate(counts.real) if real)
        filler = self._group.broadcast_object(self._batch, source)
        rows = tuple(n or num_rows(filler) for n in counts.rows)
        if not counts.rows[self._group.rank]:
            self._batch = self._filler = filler
        self._agreement.revise(BatchCounts(rows=rows, real=counts.real))

    def _read(self) -> None:
        """Read one batch and start to tell the others about it."""
        batch = _NONE if self._ended else next(self._source, _NONE)
        self._ended = batch is _NONE
        real = rows = 0 if batch is _NONE else num_rows(batch)
        if self._layout.padded:
            if batch is _NONE:
                batch = self._filler
                rows = 0 if batch is _NONE else num_rows(batch)
            elif 0 < real < self._layout.rows and self._layout.fill:
                rows = self._layout.rows
                batch = complete(batch, real, rows)
            self._filler = batch
        self._batch = batch
        self._agreement = Agreement(rows, real, self._group, together=self._together)


def reach(dataset: Any, seed: int, epoch: int) -> None:
    """Let the next iteration over a stream be that of `epoch`."""
    if isinstance(dataset, StreamShard):
        dataset.reach(seed, epoch)
    else:
        set_dataset_epoch(dataset, epoch)


def say_rereading(reader: DataLoader[Any], amount: str, position: Position) -> None:
    """Say in one line that a stream is read up to a position, and what would spare that."""
    dataset = reader.dataset
    stream = dataset.dataset if isinstance(dataset, StreamShard) else dataset
    logger.info(
        "paceline reads and drops %s of the stream %s to go on at sample %d of epoch %d; %s",
        amount, type(stream).__name__, position.samples, position.epoch,
        "use_stateful_dataloader=True would save where its workers are" if isinstance(dataset, StatefulShard)
        else "a state_dict and load_state_dict of its own would spare that",
    )  # fmt: skip


def _readers_text(ranks: int, readers: int) -> str:
    return f"{ranks} {'rank' if ranks == 1 else 'ranks'}" + (f" x {readers} readers" if readers > 1 else "")
