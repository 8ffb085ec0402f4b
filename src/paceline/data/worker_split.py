"""Splits a stream over the loader workers of all ranks, so that each item is used once."""

from __future__ import annotations

import inspect
import os
import threading
from collections import deque
from contextlib import contextmanager, nullcontext
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.data._utils import worker as torch_worker

from paceline.data.epochs import set_dataset_epoch
from paceline.data.randomness import IsolatedRng, mix_seed
from paceline.environment.object_state import OwnGenerators
from paceline.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["StreamShard", "maybe_skip_method"]

_END: Any = object()


class TrackingWorkerInfo:
    """What `get_worker_info()` returns to a data set; records whether `num_workers` was read.

    Args:
        reader: The index of this reader among those of all ranks.
        readers: The number of readers of all ranks.
        seed: The seed of this worker.
        dataset: The data set that is read.
    """

    def __init__(self, reader: int, readers: int, seed: int, dataset: Any) -> None:
        self.id = reader
        self.seed = seed
        self.dataset = dataset
        self.rng: Any = None
        self.worker_method = "multiprocessing"
        self.num_workers_was_read = False
        self._readers = readers

    @property
    def num_workers(self) -> int:
        """The number of readers that share the stream."""
        self.num_workers_was_read = True
        return self._readers


# torch keeps one worker info per process: threads that read streams take turns, or one would see the other's part.
_worker_info_lock = threading.RLock()


def _renew_lock() -> None:
    """Give a forked worker a lock that no thread of its parent holds."""
    global _worker_info_lock
    _worker_info_lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


def _current_worker_info() -> Any:
    """Return this thread's worker info: not the one that another thread shows to its data set right now."""
    with _worker_info_lock:
        return get_worker_info()


@contextmanager
def _worker_info_replaced(info: Any) -> Iterator[None]:
    """Let `get_worker_info()` return `info` while the body runs."""
    with _worker_info_lock:
        original = torch_worker._worker_info
        torch_worker._worker_info = info
        try:
            yield
        finally:
            torch_worker._worker_info = original


class StreamShard(IterableDataset[Any]):
    """One rank's part of an iterable data set.

    The data set sees a `get_worker_info()` that counts the workers of all ranks. If it reads `num_workers` before its
    first item, it splits itself, and all its items are used. If it does not, every reader reads all items and keeps
    every n-th. Up to the first item the stream runs with the same random state on all readers, so that a list that is
    shuffled there has the same order on all of them.

    Args:
        dataset: The user's data set.
        rank: The rank of this process.
        size: The number of ranks that share the stream; 1 if `dataset` yields only this rank's items.
        num_workers: The number of workers of each rank's loader.
        by_items: Share the stream item by item between ranks even if the data set splits itself, because it has too few
            shards.
        block: The number of items to take at a time: those of one batch, which the loader takes in a row anyway.

    Attributes:
        has_isolated_rng: Whether the random state is isolated while this process reads the stream. Then readers of the
            same items continue with the same random numbers after the first item, as workers do, because they also
            draw for the items that they drop. A single process begins with the same state and has the same order.
        continues_rng: Whether the next iteration begins in the random state in which it was saved.
    """

    def __init__(
        self, dataset: Any, rank: int, size: int, num_workers: int, *, by_items: bool = False, block: int = 1
    ) -> None:
        self.dataset = dataset
        self.has_isolated_rng = False
        self.continues_rng = False
        self._rank = rank
        self._size = size
        self._by_items = by_items
        self._block = block
        self._next_number = 0
        # Whether to count the items of the data set that this iteration has read, and their number.
        self._counts_items = False
        self._items = 0
        # The seed of the iteration, its epoch, and the number of items of each reader to skip.
        self._epoch_state = torch.zeros(3, dtype=torch.int64)
        # Set in workers that stay alive: in this process the loader sets them before each iteration.
        self._generators = OwnGenerators({"dataset": dataset}) if num_workers else None
        if num_workers:
            # Persistent workers see the next epoch only through shared memory.
            self._epoch_state.share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch_state(self, seed: int, epoch: int, *, skipped: int = 0) -> None:
        """Make the next iteration, in this process or in workers, that of `epoch`.

        Args:
            seed: The seed of the order.
            epoch: The number of the epoch.
            skipped: Items of each reader to skip; only for a data set that can, see `maybe_skip_method`.
        """
        self._epoch_state[0] = mix_seed(seed, epoch)
        self._epoch_state[1] = epoch
        self._epoch_state[2] = skipped
        set_dataset_epoch(self.dataset, epoch)

    def __iter__(self) -> Iterator[Any]:
        return chain.from_iterable(self._blocks())

    def _blocks(self) -> Iterator[Iterable[Any]]:
        """Yield this reader's items, some at a time."""
        real_info = _current_worker_info()
        if real_info is not None:
            self._begin_in_worker(int(self._epoch_state[1]))
        number, reread = self._restore()
        info = self._shown_info(real_info)
        stream, step, offset = self._start(info, real_info, reread)
        if stream.rng is not None and step > 1 and (real_info is not None or self.has_isolated_rng):
            stream.rng.make_global()
        if stream.first is _END:
            return
        self._next_number = (offset + 1) % step
        if step == 1 and info is real_info and not self._counts_items:
            yield (stream.first,)
            yield stream.items
            return
        kept = self._every_nth(chain((stream.first,), stream.items), info, step, (offset - number) % step)
        skipped = int(self._epoch_state[2])
        if skipped and _splits_itself(info):
            yield islice(chain.from_iterable(kept), skipped, None)
        else:
            yield from kept

    def _begin_in_worker(self, epoch: int) -> None:
        set_dataset_epoch(self.dataset, epoch)
        if self._generators is not None:
            self._generators.begin(epoch)

    def _start(self, info: Any, real_info: Any, reread: int) -> tuple[_OpenStream, int, int]:
        """Begin to iterate; also return n and the index of the first item, where this reader keeps every n-th item."""
        worker, workers = (0, 1) if real_info is None else (real_info.id, real_info.num_workers)
        skipped = int(self._epoch_state[2])
        # If the data set may split itself, nothing is skipped until that is known: its skip method might count either
        # its own items or those of all readers.
        may_split_itself = isinstance(info, TrackingWorkerInfo)
        stream = self._open(info, 0 if may_split_itself else skipped * self._size, reread)
        if not _splits_itself(info):
            step, offset = self._size * workers, self._rank * workers + worker
        elif self._by_items:
            step, offset = self._size, self._rank
        else:
            step, offset = 1, 0
        if skipped and may_split_itself and not _splits_itself(info):
            stream = self._open(info, skipped * step, 0)
        return stream, step, offset

    def _restore(self) -> tuple[int, int]:
        """Restore the data set's state, if the iteration begins at one.

        Returns:
            Which reader's turn the first item is, and how many items to read again before it.
        """
        return 0, 0

    def _open(self, info: Any, skipped: int, reread: int) -> _OpenStream:
        """Begin to iterate over the data set, and read up to the first item that is used."""
        seed = int(self._epoch_state[0])
        is_single_process = self.has_isolated_rng and self._size == 1
        rng = None if is_single_process or self.continues_rng else IsolatedRng(seed)
        with _worker_info_replaced(info), nullcontext() if rng is None else rng():
            items = _items_after(self.dataset, skipped, int(self._epoch_state[1]))
            # The random state in which the stream continues is that after the items that are read again.
            with IsolatedRng(seed)() if self.continues_rng and reread else nullcontext():
                deque(islice(items, reread), maxlen=0)
            return _OpenStream(items, next(items, _END), rng)

    def _shown_info(self, real_info: Any) -> Any:
        """Return what `get_worker_info()` returns to the data set."""
        worker, workers = (0, 1) if real_info is None else (real_info.id, real_info.num_workers)
        ranks, rank = (1, 0) if self._by_items else (self._size, self._rank)
        if ranks * workers == 1:
            return real_info
        seed = torch.initial_seed() if real_info is None else real_info.seed
        return TrackingWorkerInfo(rank * workers + worker, ranks * workers, seed, self.dataset)

    def _every_nth(self, items: Iterator[Any], info: Any, step: int, first: int) -> Iterator[list[Any]]:
        """Yield every `step`-th item from index `first` on, a block at a time."""
        must_not_split = isinstance(info, TrackingWorkerInfo) and not info.num_workers_was_read
        bounds = (first, first + (self._block - 1) * step + 1)
        next_bounds = (step - 1, self._block * step)
        while True:
            # Not `_worker_info_replaced`: this runs for every batch.
            with _worker_info_lock:
                original = torch_worker._worker_info
                torch_worker._worker_info = info
                try:
                    block = list(islice(items, *bounds, step))
                finally:
                    torch_worker._worker_info = original
            if must_not_split and info.num_workers_was_read:
                raise DataError(
                    f"The data set {type(self.dataset).__name__} read num_workers after its first item",
                    "By then its items are already being distributed one by one, and some would be lost",
                    "Call get_worker_info().num_workers at the start of __iter__",
                )
            self._items += bounds[1]
            yield block
            if len(block) < self._block:
                return
            bounds = next_bounds


def _splits_itself(info: Any) -> bool:
    """Say whether a data set has read the number of readers, to split itself."""
    return isinstance(info, TrackingWorkerInfo) and info.num_workers_was_read


class _OpenStream(NamedTuple):
    """An iteration over a data set that has begun.

    Attributes:
        items: The items after the first.
        first: The first item; `_END` if there is none.
        rng: The random state after it; None if it is the global one.
    """

    items: Iterator[Any]
    first: Any
    rng: IsolatedRng | None


def maybe_skip_method(dataset: Any) -> str | None:
    """Return the name of the method with which a data set skips items without reading them: `iter_from` or `skip`.

    `skip(n)` returns a data set without the first `n` items, `iter_from(n)` an iterator over the rest. The `skip` of
    `datasets` is not used, because it reads the items and loses the epoch's order; those data sets have a state.
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
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return len(required) == 1 and required[0].kind is not inspect.Parameter.KEYWORD_ONLY


def _items_after(dataset: Any, skipped: int, epoch: int) -> Iterator[Any]:
    """Iterate over what comes after the first `skipped` items."""
    method = maybe_skip_method(dataset) if skipped else None
    if method is None:
        return iter(dataset)
    rest = getattr(dataset, method)(skipped)
    if rest is dataset or not hasattr(rest, "__iter__"):
        result = "itself" if rest is dataset else f"a {type(rest).__name__}"
        raise DataError(
            f"{method}({skipped}) of the data set {type(dataset).__name__} returned {result}",
            "A resumed epoch needs the items after those that were used, and the next epoch needs all items again",
            "Return a new data set (skip) or an iterator (iter_from) without the first items; or rename the method, so "
            "that the items are read again",
        )
    set_dataset_epoch(rest, epoch)
    return iter(rest)
