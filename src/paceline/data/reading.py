"""What a way of reading must offer to the loader, and the way for map-style data sets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from paceline.data.epochs import set_dataset_epoch, takes_epoch
from paceline.data.randomness import seed_batches
from paceline.data.sharding import PlannedSharding
from paceline.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from paceline.collectives import Group
    from paceline.data.progress import Progress
    from paceline.data.sharding import ShardedBatchSampler

__all__ = ["MapReading", "Position", "Reading"]


@dataclass(frozen=True, slots=True)
class Position:
    """Where a pass begins.

    Attributes:
        epoch: Which epoch.
        samples: Samples used before, in the epoch's order over all ranks.
        batches: Global batches handed out before.
        ranks: How many ranks counted those batches; 0 where that is not known.
        rows: Samples in the batch of each of those ranks; 0 where that varied,
            None where that is not known.
        readers: Workers of each of those ranks, 1 if it read by itself; 0 where that is not known.
        ended: Whether the pass had come to its end there.
        stream: State of the stream on this rank, where it has one.
        micro_batches: How many of those batches made an optimizer step; 0 where that is not known.
    """

    epoch: int = 0
    samples: int = 0
    batches: int = 0
    ranks: int = 0
    rows: int | None = None
    readers: int = 0
    ended: bool = False
    stream: dict[str, Any] | None = None
    micro_batches: int = 0

    @property
    def is_within(self) -> bool:
        """Whether it lies within an epoch, not at its beginning or end."""
        return not self.ended and bool(self.samples or self.batches)


class Reading(ABC):
    """One way of getting this rank's batches.

    Attributes:
        total_batch_size: Samples of one global batch, None where it varies.
        generator: Seeds the workers; the loader sets it before each pass.
        rereads: Whether a pass that begins within an epoch reads from the beginning of the epoch.
        splits: Whether a global batch is one batch of the user's loader, however many ranks share it.
    """

    total_batch_size: int | None
    rereads = False
    splits = False

    def __init__(self, group: Group) -> None:
        self.generator = torch.Generator()
        self._group = group

    @property
    def rows(self) -> int:
        """Samples in one rank's batch; 0 where that varies, or is known only once a pass has begun."""
        return (self.total_batch_size or 0) // self._group.size

    @property
    def readers(self) -> int:
        """How many readers of this rank share its part of the data; 0 where that makes no difference."""
        return 0

    @property
    def keeps_state(self) -> bool:
        """Whether positions hold the state of a stream; the same on all ranks."""
        return False

    def recount(self, position: Position, micro_batches: int) -> Position:
        """The same place counted in batches as they are here, where an optimizer step takes as many samples as it did.

        Between two steps 2 ranks x 16 rows and 1 rank x 16 rows x 2 micro-batches are at the same sample of the same
        order, so that the steps to come are the same.

        Args:
            position: Where a pass is to begin.
            micro_batches: Batches that an optimizer step takes here.
        """
        size = self._group.size
        then, now = position.ranks * (position.rows or 0), size * self.rows
        same_step = then * position.micro_batches == now * micro_batches
        if not position.is_within or not then or not now or then == now or not same_step:
            return position
        between_steps = position.batches % position.micro_batches == 0
        # Each reader of a stream reads its own part, which no other rank goes on with.
        same_readers = self.readers == 0 or position.ranks == size
        if not between_steps or not same_readers:
            return position
        return replace(position, ranks=size, rows=self.rows, batches=position.batches * then // now)

    def check(self, position: Position, *, begun: bool = False) -> None:
        """Refuse a position within an epoch from which the same global batches cannot be gone on with.

        Args:
            position: Where a pass is to begin.
            begun: Whether it has begun, so that all that can be known is known.

        Raises:
            DataError: It was saved with another global batch.
        """
        if not position.is_within or position.rows is None or not position.ranks:
            return
        size = self._group.size
        then, now = position.ranks * position.rows, size * self.rows
        if (then == now) if then and now else (self.splits or position.ranks == size or not begun):
            return
        raise DataError(
            f"The position of a loader was saved with {batch_text(then or None, position.ranks)} "
            f"and is loaded with {batch_text(now or None, size)}",
            "Within an epoch the samples of an optimizer step must stay the same, or the steps to come would be others",
            "Keep ranks x rows, or ranks x rows x gradient_accumulation_steps, or save at the end of an epoch",
        )

    @abstractmethod
    def begin(
        self, read: Callable[[], Iterator[Any]], seed: int, position: Position
    ) -> tuple[Iterator[Any], Progress] | None:
        """Begin a pass at a position; None if no global batch is left there.

        `read` iterates the prepared loader's own `DataLoader`. Collective: every rank must call it.
        """

    def samples_before(self, seed: int, epoch: int, rounds: int) -> int:
        """Return the position in an epoch after its first `rounds` global batches.

        Collective: every rank must call it.

        Raises:
            DataError: Only reading them would tell.
        """
        if self.total_batch_size is None:
            raise DataError(
                f"{rounds} batches of varying size are to be skipped",
                "How many samples they hold is known only once they are read",
                "Save and load the loader's position instead, which counts samples",
            )
        return rounds * self.total_batch_size

    @abstractmethod
    def num_batches(self) -> int:
        """Return this rank's batches in a whole epoch; TypeError where that is not known."""

    @abstractmethod
    def size(self) -> int | None:
        """Return the samples of an epoch, None where that is not known."""

    @abstractmethod
    def describe(self, seed: int) -> str:
        """Say in one line how the data is dealt out."""


class MapReading(Reading):
    """Each rank reads its own samples of a map-style data set.

    Args:
        sampler: This rank's keys.
        dataset: Told the epoch, if it wants to know.
        group: The ranks.
        workers: How many processes read; what they draw then depends on the batch only.
        persistent: Whether they live on between passes, with their copies of the data set.
    """

    def __init__(
        self, sampler: ShardedBatchSampler, dataset: Any, group: Group, *, workers: int = 0, persistent: bool = False
    ) -> None:
        super().__init__(group)
        self._tells_workers = persistent and takes_epoch(dataset)
        self._seeds_batches = workers > 0
        self.sampler = sampler
        self._dataset = dataset
        self.total_batch_size = sampler.sharding.total_batch_size
        self.splits = sampler.sharding.splits

    @property
    def rows(self) -> int:
        """See `Reading.rows`."""
        return super().rows or self.sampler.sharding.planned_rows

    def begin(
        self, read: Callable[[], Iterator[Any]], seed: int, position: Position
    ) -> tuple[Iterator[Any], Progress] | None:
        """See `Reading.begin`."""
        begun = self.sampler.sharding.begin(seed, position.epoch, position.samples)
        if begun is None:
            return None
        set_dataset_epoch(self._dataset, position.epoch)
        batches, progress = begun
        if self._seeds_batches:
            told = position.epoch if self._tells_workers else None
            parts = (seed, position.epoch, self._group.rank)
            batches = seed_batches(batches, *parts, start=position.batches, epoch=told)
        self.sampler.follow(batches)
        return read(), progress

    def samples_before(self, seed: int, epoch: int, rounds: int) -> int:
        """See `Reading.samples_before`; a sampler of varying batches is run."""
        sharding = self.sampler.sharding
        if isinstance(sharding, PlannedSharding):
            return sharding.plan(seed, epoch, 0).samples_after(rounds)
        return super().samples_before(seed, epoch, rounds)

    def num_batches(self) -> int:
        """See `Reading.num_batches`."""
        return self.sampler.sharding.num_batches()

    def size(self) -> int | None:
        """See `Reading.size`."""
        return self.sampler.sharding.size()

    def describe(self, seed: int) -> str:
        """See `Reading.describe`."""
        sharding = self.sampler.sharding
        size, rounds = sharding.size(), sharding.num_rounds()
        parts = [
            "an unknown number of samples" if size is None else f"{size:,} samples",
            sharding.describe(seed),
            batch_text(sharding.total_batch_size, self._group.size),
        ]
        if rounds is not None:
            parts.append(f"{rounds:,} batches per rank")
        return ", ".join(parts)


def batch_text(total: int | None, ranks: int) -> str:
    """Write out a global batch: `global batch 64 = 2 ranks x 32`."""
    noun = "rank" if ranks == 1 else "ranks"
    if total is None:
        return f"batches of varying size over {ranks} {noun}"
    return f"global batch {total:,} = {ranks} {noun} x {total // ranks:,}"
