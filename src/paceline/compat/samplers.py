"""Which samples each rank gets from Accelerate's loaders, and in which order.

The samples, the order and the random numbers drawn are those of Accelerate 1.15, so that a script gives the same
numbers on both.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import BatchSampler, IterableDataset, RandomSampler

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["BatchSamplerShard", "IterableDatasetShard", "SeedableRandomSampler", "SkipBatchSampler"]


class SeedableRandomSampler(RandomSampler):
    """A random sampler whose order depends only on a seed and the number of the epoch.

    The epoch advances by itself at the end of each pass.

    Args:
        args: Arguments of `RandomSampler`.
        data_seed: The seed; by default the one that torch's global generator was last seeded with.
        kwargs: Arguments of `RandomSampler`.
    """

    def __init__(self, *args: Any, data_seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.initial_seed = torch.initial_seed() if data_seed is None else data_seed
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        if self.generator is None:
            self.generator = new_generator()
        self.generator.manual_seed(self.initial_seed + self.epoch)
        yield from super().__iter__()
        self.set_epoch(self.epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass that of `epoch`."""
        self.epoch = epoch


class BatchSamplerShard(BatchSampler):
    """One rank's batches out of those of another batch sampler.

    Rank by rank, each gets one of `num_processes` consecutive batches; with `split_batches` each gets its part of every
    batch. What is missing in the last round is filled with samples from the start (`even_batches`), dropped with the
    incomplete round (where the batch sampler has `drop_last`), or left out, so that some ranks have a batch less.

    A batch sampler without `batch_size` may yield batches of any size; whole batches fill its last round.
    `num_processes` and `process_index` may be assigned, and hold for the next pass.

    Args:
        batch_sampler: Yields the batches of all ranks.
        num_processes: The number of ranks.
        process_index: This rank.
        split_batches: Whether every batch is divided among the ranks.
        even_batches: Whether all ranks get the same number of full batches.

    Raises:
        ValueError: `split_batches` with a batch size that the ranks cannot share evenly.
    """

    def __init__(
        self,
        batch_sampler: BatchSampler,
        num_processes: int = 1,
        process_index: int = 0,
        split_batches: bool = False,
        even_batches: bool = True,
    ) -> None:
        self.batch_sampler = batch_sampler
        self.num_processes = num_processes
        self.process_index = process_index
        self.split_batches = split_batches
        self.even_batches = even_batches
        self.batch_size: Any = getattr(batch_sampler, "batch_size", None)
        self.drop_last = getattr(batch_sampler, "drop_last", False)
        if split_batches and (self.batch_size is None or self.batch_size % num_processes != 0):
            raise ValueError(_indivisible(self.batch_size, num_processes))

    @property
    def total_length(self) -> int:
        """The number of batches of all ranks."""
        return len(self.batch_sampler)

    def __len__(self) -> int:
        if self.split_batches:
            return self.total_length
        rounds, left_over = divmod(self.total_length, self.num_processes)
        if left_over == 0 or self.drop_last:
            return rounds
        if self.even_batches or self.process_index < left_over:
            return rounds + 1
        return rounds

    def __iter__(self) -> Iterator[list[int]]:
        return self._parts() if self.split_batches else self._turns()

    def _parts(self) -> Iterator[list[int]]:
        """This rank's part of every batch."""
        size = self.batch_size // self.num_processes
        part = slice(size * self.process_index, size * (self.process_index + 1))
        first: list[int] | None = None
        short: list[int] | None = None
        for batch in self.batch_sampler:
            if short is not None:
                yield from _unless_empty(short[part])
                short = None
            if first is None:
                first = list(batch)
            if len(batch) == self.batch_size:
                yield batch[part]
            else:
                short = list(batch)
        # Only a short batch at the very end is filled up.
        if short is None or self.drop_last or not first:
            return
        if self.even_batches:
            short += itertools.islice(itertools.cycle(first), self.batch_size - len(short))
        yield from _unless_empty(short[part])

    def _turns(self) -> Iterator[list[int]]:
        """This rank's batch of every round."""
        start: list[list[int]] = []
        current: list[list[int]] = []
        for batch in self.batch_sampler:
            # A full round whose last batch is short: it was not the end.
            if len(current) == self.num_processes:
                yield current[self.process_index]
                current = []
            if len(start) < self.num_processes:
                start.append(batch)
            current.append(batch)
            if len(current) == self.num_processes and self._is_full(batch):
                yield current[self.process_index]
                current = []
        if not current or self.drop_last:
            return
        if self.even_batches:
            yield self._filled(current, start)
        elif self.process_index < len(current):
            yield current[self.process_index]

    def _is_full(self, batch: list[int]) -> bool:
        return self.batch_size is None or len(batch) == self.batch_size

    def _filled(self, last: list[list[int]], start: list[list[int]]) -> list[int]:
        """This rank's batch of the last round, with what is missing taken from the start."""
        if self.batch_size is None:
            batches = itertools.chain(last, itertools.cycle(start))
            return next(itertools.islice(batches, self.process_index, None))
        fillers = itertools.cycle(itertools.chain.from_iterable(start))
        batch: list[int] = []
        for position in range(self.process_index + 1):
            batch = list(last[position]) if position < len(last) else []
            batch += itertools.islice(fillers, self.batch_size - len(batch))
        return batch


def _indivisible(batch_size: int | None, ranks: int) -> str:
    return (
        f"split_batches=True with batches of {batch_size} samples on {ranks} processes: each is divided among the "
        f"processes in equal parts. Choose a batch size that is a round multiple of {ranks}, or split_batches=False."
    )


def _unless_empty(batch: list[int]) -> Iterator[list[int]]:
    if batch:
        yield batch


class SkipBatchSampler(BatchSampler):
    """Another batch sampler without its first batches.

    Args:
        batch_sampler: The other one.
        skip_batches: How many to leave out.
    """

    def __init__(self, batch_sampler: BatchSampler, skip_batches: int = 0) -> None:
        self.batch_sampler = batch_sampler
        self.skip_batches = skip_batches

    def __getattr__(self, name: str) -> Any:
        # The batch size, num_processes and so on are those of the whole.
        if name.startswith("__") or name == "batch_sampler":
            raise AttributeError(name)
        return getattr(self.batch_sampler, name)

    @property
    def total_length(self) -> int:
        """The number of batches with those left out."""
        return len(self.batch_sampler)

    def __len__(self) -> int:
        return self.total_length - self.skip_batches

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.islice(iter(self.batch_sampler), self.skip_batches, None)


class IterableDatasetShard(IterableDataset[Any]):
    """One rank's samples out of a stream that every rank reads as a whole.

    Consecutive blocks of one global batch are divided among the ranks. The last, incomplete block is filled with
    samples of the first one, or dropped.

    Args:
        dataset: The stream. A `generator` that it has is seeded with the epoch, if it has no `set_epoch` itself.
        batch_size: Samples in a batch of one rank, or of all ranks with `split_batches`.
        drop_last: Whether the incomplete block is dropped.
        num_processes: The number of ranks.
        process_index: This rank.
        split_batches: Whether `batch_size` is that of all ranks.

    Raises:
        ValueError: `split_batches` with a batch size that the ranks cannot share evenly.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 1,
        drop_last: bool = False,
        num_processes: int = 1,
        process_index: int = 0,
        split_batches: bool = False,
    ) -> None:
        if split_batches and batch_size > 1 and batch_size % num_processes != 0:
            raise ValueError(_indivisible(batch_size, num_processes))
        self.dataset = dataset
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.num_processes = num_processes
        self.process_index = process_index
        self.split_batches = split_batches
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Pass `epoch` on to the stream."""
        self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        """As many samples as this rank yields, if the stream knows its length; otherwise its `TypeError`."""
        blocks = len(self.dataset) / (self.batch_size * self.num_processes)
        return self.batch_size * (math.floor(blocks) if self.drop_last else math.ceil(blocks))

    def __iter__(self) -> Iterator[Any]:
        generator = getattr(self.dataset, "generator", None)
        if isinstance(generator, torch.Generator) and not hasattr(self.dataset, "set_epoch"):
            generator.manual_seed(self.epoch)
        size, share = self._sizes()
        local = slice(self.process_index * share, (self.process_index + 1) * share)
        first: list[Any] = []
        for block in _blocks(self.dataset, size):
            first = first or block
            if len(block) < size:
                if self.drop_last:
                    return
                block = [*block, *itertools.islice(itertools.cycle(first), size - len(block))]
            yield from block[local]

    def _sizes(self) -> tuple[int, int]:
        """Samples in a block, and in one rank's share of it."""
        if self.split_batches:
            return self.batch_size, self.batch_size // self.num_processes
        return self.batch_size * self.num_processes, self.batch_size


def _blocks(samples: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` samples; the last one may be shorter."""
    block: list[Any] = []
    for sample in samples:
        block.append(sample)
        if len(block) == size:
            yield block
            block = []
    if block:
        yield block


def new_generator() -> torch.Generator:
    """A generator on torch's default device."""
    return torch.Generator(device=torch.get_default_device())
