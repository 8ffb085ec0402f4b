"""Tracks how far an iteration over a loader has come: batches yielded, their samples, and whether more follow."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paceline.errors import DataError

if TYPE_CHECKING:
    from paceline.collectives import BatchCounts
    from paceline.data.epoch_plan import EpochPlan

__all__ = ["IterationProgress", "PlannedProgress", "RecordedBatch", "RecordedProgress"]


class IterationProgress(ABC):
    """Counts batches when they are yielded, however far reading and copying are ahead.

    Attributes:
        num_yielded: Batches yielded so far.
    """

    def __init__(self) -> None:
        self.num_yielded = 0

    def advance(self) -> None:
        """Make the next batch the current one."""
        self.num_yielded += 1

    @property
    def counts(self) -> BatchCounts:
        """Samples per rank in the current batch.

        Raises:
            DataError: No batch was yielded yet.
        """
        if not self.num_yielded:
            raise DataError(
                "`counts` was read before the first batch",
                "It describes the current batch",
                "Read it inside the loop",
            )
        return self._counts()

    @abstractmethod
    def _counts(self) -> BatchCounts: ...

    @property
    @abstractmethod
    def samples(self) -> int:
        """Position in the epoch's order after the batches yielded."""

    @property
    @abstractmethod
    def ended(self) -> bool:
        """Whether no rank gets a batch after the current one; may wait for other ranks."""

    @property
    @abstractmethod
    def remaining(self) -> int | None:
        """Batches after the current one; None if unknown."""

    @property
    def stream(self) -> dict[str, Any] | None:
        """State of the stream after the batches yielded; None if it has none."""
        return None

    @property
    def at_end(self) -> bool:
        """Whether the current batch is the last one of the iteration."""
        return self.num_yielded > 0 and self.remaining == 0


class PlannedProgress(IterationProgress):
    """Progress through a plan: everything follows from the number of batches yielded."""

    def __init__(self, plan: EpochPlan, rank: int) -> None:
        super().__init__()
        self._plan = plan
        self._batches = plan.num_batches(rank)

    def _counts(self) -> BatchCounts:
        return self._plan.counts(self.num_yielded - 1)

    @property
    def samples(self) -> int:
        """See `IterationProgress.samples`."""
        return self._plan.samples_after(self.num_yielded)

    @property
    def ended(self) -> bool:
        """See `IterationProgress.ended`."""
        return self.num_yielded >= self._plan.num_global_batches

    @property
    def remaining(self) -> int | None:
        """See `IterationProgress.remaining`."""
        return self._batches - self.num_yielded

    @property
    def at_end(self) -> bool:
        """See `IterationProgress.at_end`."""
        return 0 < self.num_yielded == self._batches


@dataclass(frozen=True, slots=True)
class RecordedBatch:
    """A global batch that was read and not yielded yet.

    Attributes:
        counts: Samples per rank.
        samples: Position in the epoch after it.
        is_last: Whether this rank gets no batch after it.
        is_last_of_all: Whether no rank gets a batch after it.
    """

    counts: BatchCounts
    samples: int
    is_last: bool
    is_last_of_all: bool


class RecordedProgress(IterationProgress):
    """Progress through batches that are only known once they are read.

    Args:
        samples: Position at which the iteration begins.
    """

    def __init__(self, samples: int) -> None:
        super().__init__()
        self._start = samples
        self._waiting: deque[RecordedBatch] = deque()
        self._current: RecordedBatch | None = None

    def record(self, current: RecordedBatch) -> None:
        """Add a batch that will be yielded after those added before."""
        self._waiting.append(current)

    def advance(self) -> None:
        """See `IterationProgress.advance`."""
        self._current = self._waiting.popleft()
        self.num_yielded += 1

    def _counts(self) -> BatchCounts:
        assert self._current is not None
        return self._current.counts

    @property
    def samples(self) -> int:
        """See `IterationProgress.samples`."""
        return self._start if self._current is None else self._current.samples

    @property
    def ended(self) -> bool:
        """See `IterationProgress.ended`."""
        return self._current is not None and self._current.is_last_of_all

    @property
    def remaining(self) -> int | None:
        """See `IterationProgress.remaining`: 0 or None."""
        return 0 if self._current is not None and self._current.is_last else None
