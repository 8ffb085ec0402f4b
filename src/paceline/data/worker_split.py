"""Splits a stream over all readers: the workers of all ranks, so that each item is used once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.data._utils import worker as torch_worker

from paceline.data.epochs import set_dataset_epoch
from paceline.data.randomness import PrivateRandomness, mix_seed
from paceline.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["StreamShard"]

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


def _advance(items: Iterator[Any], info: Any) -> Any:
    """Return the next item, or `_END`, letting `get_worker_info()` return `info` meanwhile."""
    real = torch_worker._worker_info
    torch_worker._worker_info = info
    try:
        return next(items, _END)
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
    """

    def __init__(self, dataset: Any, rank: int, size: int, num_workers: int, *, by_items: bool = False) -> None:
        self.dataset = dataset
        self._rank = rank
        self._size = size
        self._by_items = by_items
        self._next_number = 0
        self._moment = torch.zeros(2, dtype=torch.int64)
        if num_workers:
            # Workers that live on see the next epoch only through shared memory.
            self._moment.share_memory_()  # type: ignore[no-untyped-call]

    def reach(self, seed: int, epoch: int) -> None:
        """Make the next iteration, in this process or in workers, that of `epoch`."""
        self._moment[0] = mix_seed(seed, epoch)
        self._moment[1] = epoch
        set_dataset_epoch(self.dataset, epoch)

    def __iter__(self) -> Iterator[Any]:
        real = get_worker_info()
        worker, workers = (0, 1) if real is None else (real.id, real.num_workers)
        info = self._info(real, worker, workers)
        if real is not None:
            set_dataset_epoch(self.dataset, int(self._moment[1]))
        number = self._restore()
        randomness = PrivateRandomness(int(self._moment[0]))
        with randomness():
            items = _open(self.dataset, info)
            first = _advance(items, info)
        asked = isinstance(info, RecordingInfo) and info.asked
        if not asked:
            step, offset = self._size * workers, self._rank * workers + worker
        elif self._by_items:
            step, offset = self._size, self._rank
        else:
            step, offset = 1, 0
        if step > 1 and real is not None:
            # Readers of the same items must go on drawing alike: what one of them drops was drawn for, too.
            randomness.adopt()
        if step == 1 and info is real:
            if first is not _END:
                yield first
                yield from items
            return
        yield from self._kept(first, items, info, step, offset, number)

    def _restore(self) -> int:
        """Go to where the pass is to begin; return where its first item falls among the readers."""
        return 0

    def _info(self, real: Any, worker: int, workers: int) -> Any:
        ranks, rank = (1, 0) if self._by_items else (self._size, self._rank)
        if ranks * workers == 1:
            return real
        seed = torch.initial_seed() if real is None else real.seed
        return RecordingInfo(rank * workers + worker, ranks * workers, seed, self.dataset)

    def _kept(self, item: Any, items: Iterator[Any], info: Any, step: int, offset: int, number: int) -> Iterator[Any]:
        late = isinstance(info, RecordingInfo) and not info.asked
        while item is not _END:
            following = number + 1 if number + 1 < step else 0
            if number == offset:
                self._next_number = following
                yield item
            number = following
            item = _advance(items, info)
            if late and info.asked:
                raise DataError(
                    f"The data set {type(self.dataset).__name__} asked for num_workers after its first item",
                    "By then its items are already being shared out one by one, and some would be lost",
                    "Call get_worker_info().num_workers at the start of __iter__",
                )


def _open(dataset: Any, info: Any) -> Iterator[Any]:
    real = torch_worker._worker_info
    torch_worker._worker_info = info
    try:
        return iter(dataset)
    finally:
        torch_worker._worker_info = real
