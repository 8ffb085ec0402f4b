"""The interface through which a prepared loader gets its batches, and its version for map-style data sets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from paceline.data.epochs import has_set_epoch, set_dataset_epoch
from paceline.data.randomness import seed_batches
from paceline.data.sharding import PlannedSharding
from paceline.errors import DataError, counted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from paceline.collectives import Group
    from paceline.data.iteration_progress import IterationProgress
    from paceline.data.sharding import ShardedBatchSampler

__all__ = ["BatchSource", "MapBatchSource", "Position"]


@dataclass(frozen=True, slots=True)
class Position:
    """Where an iteration begins.

    Attributes:
        epoch: The number of the epoch, from 0.
        samples: Samples used before, in the epoch's order over all ranks.
        batches: Global batches yielded before.
        ranks: The number of ranks that shared each of those batches; 0 if unknown.
        batch_size: Samples in the batch of each of those ranks; 0 if that varied, None if unknown.
        readers: Loader workers of each of those ranks, 1 if it read by itself; 0 if unknown.
        ended: Whether the iteration had reached its end.
        stream: State of the stream on this rank, if it has one.
        micro_batches: How many of those batches made an optimizer step; 0 if unknown.
    """

    epoch: int = 0
    samples: int = 0
    batches: int = 0
    ranks: int = 0
    batch_size: int | None = None
    readers: int = 0
    ended: bool = False
    stream: dict[str, Any] | None = None
    micro_batches: int = 0

    @property
    def is_within(self) -> bool:
        """Whether it lies within an epoch, not at its beginning or end."""
        return not self.ended and bool(self.samples or self.batches)


class BatchSource(ABC):
    """Where a prepared loader gets this rank's batches from.

    Attributes:
        total_batch_size: Samples of one global batch, None if it varies.
        generator: Seeds the workers; the loader sets it before each iteration.
        rereads: Whether an iteration that begins within an epoch reads from the beginning of the epoch.
        splits: Whether a global batch is one batch of the user's loader, however many ranks share it.
    """

    total_batch_size: int | None
    rereads = False
    splits = False

    def __init__(self, group: Group) -> None:
        self.generator = torch.Generator()
        self._group = group

    @property
    def batch_size(self) -> int:
        """Samples in one rank's batch; 0 if that varies, or is known only once an iteration has begun."""
        return (self.total_batch_size or 0) // self._group.size

    @property
    def readers(self) -> int:
        """The number of readers that share this rank's part of the data; 0 if that makes no difference."""
        return 0

    @property
    def has_stream_state(self) -> bool:
        """Whether positions include the state of a stream; the same on all ranks."""
        return False

    def recount(self, position: Position, micro_batches: int) -> Position:
        """Return the same position counted in this loader's batches, if optimizer steps still take the same samples.

        Between two steps, 2 ranks x 16 samples and 1 rank x 16 samples x 2 micro-batches are at the same sample of the
        same order, so the remaining steps are the same.

        Args:
            position: Where an iteration is to begin.
            micro_batches: Batches that make an optimizer step now.
        """
        size = self._group.size
        saved_size, current_size = position.ranks * (position.batch_size or 0), size * self.batch_size
        same_step = saved_size * position.micro_batches == current_size * micro_batches
        sizes_changed = 0 < saved_size != current_size > 0
        if not position.is_within or not sizes_changed or not same_step:
            return position
        between_steps = position.batches % position.micro_batches == 0
        # Each reader of a stream reads its own part, which no other rank can continue.
        same_readers = self.readers == 0 or position.ranks == size
        if not between_steps or not same_readers:
            return position
        batches = position.batches * saved_size // current_size
        return replace(position, ranks=size, batch_size=self.batch_size, batches=batches)

    def check(self, position: Position, *, begun: bool = False) -> None:
        """Reject a position within an epoch from which the same global batches cannot follow.

        Args:
            position: Where an iteration is to begin.
            begun: Whether it has begun, so that everything about the batches is known.

        Raises:
            DataError: It was saved with another global batch.
        """
        if not position.is_within or position.batch_size is None or not position.ranks:
            return
        size = self._group.size
        saved_size, current_size = position.ranks * position.batch_size, size * self.batch_size
        if saved_size and current_size:
            fits = saved_size == current_size
        else:
            fits = self.splits or position.ranks == size or not begun
        if fits:
            return
        raise DataError(
            f"The position of a loader was saved with {batch_text(saved_size or None, position.ranks)} "
            f"and is loaded with {batch_text(current_size or None, size)}",
            "Within an epoch an optimizer step must keep its samples, or the remaining steps would differ",
            "Keep ranks x batch size, or ranks x batch size x gradient_accumulation_steps, or save at the end of an "
            "epoch",
        )

    @abstractmethod
    def begin(
        self, read: Callable[[], Iterator[Any]], seed: int, position: Position
    ) -> tuple[Iterator[Any], IterationProgress] | None:
        """Begin an iteration at a position; return its batches and their progress, or None if no global batch is left.

        `read` iterates the prepared loader's own `DataLoader`. Collective: every rank must call it.
        """

    def samples_before(self, seed: int, epoch: int, num_batches: int) -> int:
        """Return the position in an epoch after its first `num_batches` global batches.

        Collective: every rank must call it.

        Raises:
            DataError: The batches would have to be read to know that.
        """
        if self.total_batch_size is None:
            raise DataError(
                f"Cannot skip {num_batches} batches of varying size",
                "The number of samples in them is known only once they are read",
                "Save and load the loader's position instead, which counts samples",
            )
        return num_batches * self.total_batch_size

    @abstractmethod
    def num_batches(self) -> int:
        """Return the number of this rank's batches in a whole epoch; raise TypeError if unknown."""

    def may_differ_from_length(self, samples: int) -> bool:
        """Whether an epoch of `samples` samples may have other than `num_batches` batches, although no length is wrong.

        Args:
            samples: Samples of the epoch that were yielded, over all ranks.
        """
        return False

    @abstractmethod
    def size(self) -> int | None:
        """Return the number of samples in an epoch, None if unknown."""

    @abstractmethod
    def describe(self, seed: int) -> str:
        """Describe in one line how the data is distributed."""


class MapBatchSource(BatchSource):
    """Each rank reads its own samples of a map-style data set.

    Args:
        sampler: Yields this rank's keys.
        dataset: Its `set_epoch` is called, if it has one.
        group: The ranks.
        workers: The number of loader workers; what they draw at random depends on the batch only.
        persistent: Whether workers, with their copies of the data set, stay alive between iterations.
    """

    def __init__(
        self, sampler: ShardedBatchSampler, dataset: Any, group: Group, *, workers: int = 0, persistent: bool = False
    ) -> None:
        super().__init__(group)
        self._sets_worker_epoch = persistent and has_set_epoch(dataset)
        self._seeds_batches = workers > 0
        self.sampler = sampler
        self._dataset = dataset
        self.total_batch_size = sampler.sharding.total_batch_size
        self.splits = sampler.sharding.splits

    @property
    def batch_size(self) -> int:
        """See `BatchSource.batch_size`."""
        return super().batch_size or self.sampler.sharding.planned_batch_size

    def begin(
        self, read: Callable[[], Iterator[Any]], seed: int, position: Position
    ) -> tuple[Iterator[Any], IterationProgress] | None:
        """See `BatchSource.begin`."""
        begun = self.sampler.sharding.begin(seed, position.epoch, position.samples)
        if begun is None:
            return None
        set_dataset_epoch(self._dataset, position.epoch)
        batches, progress = begun
        if self._seeds_batches:
            epoch = position.epoch if self._sets_worker_epoch else None
            seed_parts = (seed, position.epoch, self._group.rank)
            batches = seed_batches(batches, *seed_parts, start=position.batches, epoch=epoch)
        self.sampler.set_batches(batches)
        return read(), progress

    def samples_before(self, seed: int, epoch: int, num_batches: int) -> int:
        """See `BatchSource.samples_before`; runs a sampler whose batches vary in size."""
        sharding = self.sampler.sharding
        if isinstance(sharding, PlannedSharding):
            return sharding.samples_before(seed, epoch, num_batches)
        return super().samples_before(seed, epoch, num_batches)

    def num_batches(self) -> int:
        """See `BatchSource.num_batches`."""
        return self.sampler.sharding.num_batches()

    def size(self) -> int | None:
        """See `BatchSource.size`."""
        return self.sampler.sharding.size()

    def describe(self, seed: int) -> str:
        """See `BatchSource.describe`."""
        sharding = self.sampler.sharding
        size, num_batches = sharding.size(), sharding.num_global_batches()
        parts = [
            "an unknown number of samples" if size is None else counted(size, "sample"),
            sharding.describe(seed),
            batch_text(sharding.total_batch_size, self._group.size),
        ]
        if num_batches is not None:
            parts.append(f"{counted(num_batches, 'batch')} per rank")
        repeated = sharding.num_repeated()
        if repeated:
            parts.append(f"the last filled up with {counted(repeated, 'sample')} from the start of the epoch")
        return ", ".join(parts)


def batch_text(total: int | None, ranks: int) -> str:
    """Describe a global batch: `global batch of 64 samples = 2 ranks x 32 samples`."""
    sharers = counted(ranks, "rank")
    if total is None:
        return f"batches of varying size over {sharers}"
    return f"global batch of {counted(total, 'sample')} = {sharers} x {counted(total // ranks, 'sample')}"
