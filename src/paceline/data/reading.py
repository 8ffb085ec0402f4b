"""What a way of reading must offer to the loader, and the way for map-style data sets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from paceline.data.worker_split import set_dataset_epoch

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
    """

    epoch: int = 0
    samples: int = 0
    batches: int = 0
    ranks: int = 0


class Reading(ABC):
    """One way of getting this rank's batches.

    Attributes:
        total_batch_size: Samples of one global batch, None where it varies.
        generator: Seeds the workers; the loader sets it before each pass.
    """

    total_batch_size: int | None

    def __init__(self) -> None:
        self.generator = torch.Generator()

    @abstractmethod
    def begin(
        self, read: Callable[[], Iterator[Any]], seed: int, position: Position
    ) -> tuple[Iterator[Any], Progress] | None:
        """Begin a pass at a position; None if no global batch is left there.

        `read` iterates the prepared loader's own `DataLoader`. Collective: every rank must call it.
        """

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
    """Each rank reads its own samples of a map-style data set."""

    def __init__(self, sampler: ShardedBatchSampler, dataset: Any, group: Group) -> None:
        super().__init__()
        self.sampler = sampler
        self._dataset = dataset
        self._group = group
        self.total_batch_size = sampler.sharding.total_batch_size

    def begin(
        self, read: Callable[[], Iterator[Any]], seed: int, position: Position
    ) -> tuple[Iterator[Any], Progress] | None:
        """See `Reading.begin`."""
        begun = self.sampler.sharding.begin(seed, position.epoch, position.samples)
        if begun is None:
            return None
        set_dataset_epoch(self._dataset, position.epoch)
        batches, progress = begun
        self.sampler.follow(batches)
        return read(), progress

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
