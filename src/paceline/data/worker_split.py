"""Splits a stream over all readers: the workers of all ranks, so that each item is used once."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.data._utils import worker as torch_worker

from paceline.data.epochs import set_dataset_epoch
from paceline.data.randomness import PrivateRandomness, mix_seed
from paceline.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["StreamShard", "way_to_skip"]

_END: Any = object()


class RecordingInfo:
    """What `get_worker_info()` returns to a data set; notes whether it asked how many readers there are."""

    def __init__(self, reader: int, readers: int, seed: int, dataset: Any) -> None:
        self.id = reader
        self.seed = seed
        self.dataset = dataset
        self.rng: Any = None
        self.worker_method = "multiprocessing"
        self.asked = False
        self._readers = readers

    @property
    def num_workers(self) -> int:
        """How many readers share the stream."""
        self.asked = True
        return self._readers


@contextmanager
def _showing(info: Any) -> Iterator[None]:
    """Let `get_worker_info()` return `info` while the body runs."""
    real = torch_worker._worker_info
    torch_worker._worker_info = info
    try:
        yield
    finally:
        torch_worker._worker_info = real


class StreamShard(IterableDataset[Any]):
    """One rank's part of an iterable data set.

    The data set is shown a `get_worker_info()` that counts the workers of all ranks. If it asks for
    `num_workers` before its first item it splits itself, and all its items are used. If it does not ask,
    every reader reads all items and keeps every n-th. The start of the stream up to the first item runs with
    the same random state on all readers, so that a list shuffled there has one order.

    Args:
        dataset: The user's own.
        rank: Of this process.
        size: How many ranks share the stream; 1 if `dataset` yields only this rank's items.
        num_workers: Of each rank's loader.
        by_items: Let ranks share the stream item by item even if the data set asks: it has too few pieces.
        block: Items that are taken at a time: those of one batch, which the loader asks for in a row anyway.

    Attributes:
        alone: Whether random numbers are this stream's own while it is read in this process. Then readers of the
            same items go on drawing alike after the first, as workers do: what one of them drops was drawn for, too.
    """

    def __init__(
        self, dataset: Any, rank: int, size: int, num_workers: int, *, by_items: bool = False, block: int = 1
    ) -> None:
        self.dataset = dataset
        self.alone = False
        self._rank = rank
        self._size = size
        self._by_items = by_items
        self._block = block
        self._next_number = 0
        # Whether, and how many, items of the data set are counted that this pass has taken or dropped.
        self._counts_items = False
        self._items = 0
        # The seed of the pass, its epoch, and how many items of each reader come before it.
        self._moment = torch.zeros(3, dtype=torch.int64)
        if num_workers:
            # Workers that live on see the next epoch only through shared memory.
            self._moment.share_memory_()  # type: ignore[no-untyped-call]

    def reach(self, seed: int, epoch: int, *, skipped: int = 0) -> None:
        """Make the next iteration, in this process or in workers, that of `epoch`.

        Args:
            seed: Of the order.
            epoch: Which one.
            skipped: Begin after so many items of this reader, by what `way_to_skip` found.
        """
        self._moment[0] = mix_seed(seed, epoch)
        self._moment[1] = epoch
        self._moment[2] = skipped
        set_dataset_epoch(self.dataset, epoch)

    def __iter__(self) -> Iterator[Any]:
        return chain.from_iterable(self._blocks())

    def _blocks(self) -> Iterator[Iterable[Any]]:
        """Yield this reader's items, some at a time."""
        real = get_worker_info()
        worker, workers = (0, 1) if real is None else (real.id, real.num_workers)
        info = self._info(real, worker, workers)
        if real is not None:
            set_dataset_epoch(self.dataset, int(self._moment[1]))
        skipped = int(self._moment[2])
        number, again = self._restore()
        splits_itself = isinstance(info, RecordingInfo)
        # Whether the data set splits itself is seen first: what its own skipping would count then, nobody can say.
        items, first, randomness = self._opened(info, 0 if splits_itself else skipped * self._size, again)
        asked = splits_itself and info.asked
        if not asked:
            step, offset = self._size * workers, self._rank * workers + worker
        elif self._by_items:
            step, offset = self._size, self._rank
        else:
            step, offset = 1, 0
        if skipped and splits_itself and not asked:
            items, first, randomness = self._opened(info, skipped * step, 0)
        if step > 1 and (real is not None or self.alone):
            randomness.adopt()
        if first is _END:
            return
        self._next_number = (offset + 1) % step
        if step == 1 and info is real and not self._counts_items:
            yield (first,)
            yield items
            return
        kept = self._kept(chain((first,), items), info, step, (offset - number) % step)
        if skipped and asked:
            yield islice(chain.from_iterable(kept), skipped, None)
        else:
            yield from kept

    def _restore(self) -> tuple[int, int]:
        """Go to where the pass is to begin.

        Return where its first item falls among the readers, and how many items before it are to be read again.
        """
        return 0, 0

    def _opened(self, info: Any, skipped: int, again: int) -> tuple[Iterator[Any], Any, PrivateRandomness]:
        """Begin to iterate; return the iterator, the first item, and the random numbers that go on after it."""
        randomness = PrivateRandomness(int(self._moment[0]))
        with randomness(), _showing(info):
            items = _items_after(self.dataset, skipped, int(self._moment[1]))
            return items, next(islice(items, again, None), _END), randomness

    def _info(self, real: Any, worker: int, workers: int) -> Any:
        ranks, rank = (1, 0) if self._by_items else (self._size, self._rank)
        if ranks * workers == 1:
            return real
        seed = torch.initial_seed() if real is None else real.seed
        return RecordingInfo(rank * workers + worker, ranks * workers, seed, self.dataset)

    def _kept(self, items: Iterator[Any], info: Any, step: int, lead: int) -> Iterator[list[Any]]:
        """Yield every `step`-th item, the first of them after `lead` others."""
        late = isinstance(info, RecordingInfo) and not info.asked
        bounds = (lead, lead + (self._block - 1) * step + 1)
        following = (step - 1, self._block * step)
        while True:
            real = torch_worker._worker_info
            torch_worker._worker_info = info
            try:
                block = list(islice(items, *bounds, step))
            finally:
                torch_worker._worker_info = real
            if late and info.asked:
                raise DataError(
                    f"The data set {type(self.dataset).__name__} asked for num_workers after its first item",
                    "By then its items are already being shared out one by one, and some would be lost",
                    "Call get_worker_info().num_workers at the start of __iter__",
                )
            self._items += bounds[1]
            yield block
            if len(block) < self._block:
                return
            bounds = following


def way_to_skip(dataset: Any) -> str | None:
    """Name the method by which a data set leaves items out without reading them: `iter_from(n)`, else `skip(n)`.

    `skip(n)` returns a data set without the first `n` items, `iter_from(n)` an iterator over the rest. Not counted is
    the `skip` of `datasets`, which reads, and forgets the epoch's order: those data sets have a state.
    """
    if hasattr(dataset, "_ex_iterable"):
        return None
    return next((name for name in ("iter_from", "skip") if _takes_one_number(getattr(dataset, name, None))), None)


def _takes_one_number(method: Any) -> bool:
    if not callable(method):
        return False
    try:
        parameters = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):
        return False
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return len(needed) == 1 and needed[0].kind is not inspect.Parameter.KEYWORD_ONLY


def _items_after(dataset: Any, skipped: int, epoch: int) -> Iterator[Any]:
    """Iterate over what comes after the first `skipped` items."""
    way = way_to_skip(dataset) if skipped else None
    if way is None:
        return iter(dataset)
    rest = getattr(dataset, way)(skipped)
    if rest is dataset or not hasattr(rest, "__iter__"):
        raise DataError(
            f"{way}({skipped}) of the data set {type(dataset).__name__} returned {_named(rest, dataset)}",
            "A resumed pass asks for what comes after the items that were used, and the next pass for all again",
            "Return a new data set (skip) or an iterator (iter_from) without the first items, or give the method "
            "another name: then the items are read again",
        )
    set_dataset_epoch(rest, epoch)
    return iter(rest)


def _named(value: Any, dataset: Any) -> str:
    return "itself" if value is dataset else f"a {type(value).__name__}"
