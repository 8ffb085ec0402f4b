"""Where a pass over a loader stands: what was handed out, what that was, and whether more comes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paceline.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable

    from paceline.collectives import BatchCounts
    from paceline.data.plan import Plan

__all__ = ["PlannedProgress", "Progress", "RecordedProgress", "Round", "known"]


class Progress(ABC):
    """Counts batches when they are handed out, however far readers and copies are ahead.

    Attributes:
        handed: Batches handed out so far.
    """

    def __init__(self) -> None:
        self.handed = 0

    def hand_out(self) -> None:
        """Note that the next batch is now in use."""
        self.handed += 1

    @property
    def counts(self) -> BatchCounts:
        """Samples per rank in the batch in use.

        Raises:
            DataError: No batch was handed out yet.
        """
        if not self.handed:
            raise DataError(
                "The counts of a batch were asked for before the first batch",
                "They belong to the batch in use",
                "Ask for them inside the loop",
            )
        return self._counts()

    @abstractmethod
    def _counts(self) -> BatchCounts: ...

    @property
    @abstractmethod
    def samples(self) -> int:
        """Position in the epoch's order after the batches handed out."""

    @property
    @abstractmethod
    def ended(self) -> bool:
        """Whether no rank gets a batch after the one in use; may wait for other ranks."""

    @property
    @abstractmethod
    def remaining(self) -> int | None:
        """Batches after the one in use; None if that is not known."""

    @property
    def stream(self) -> dict[str, Any] | None:
        """State of the stream after the batches handed out; None if it has none."""
        return None

    @property
    def at_end(self) -> bool:
        """Whether the last batch of the pass is in use."""
        return self.handed > 0 and self.remaining == 0


class PlannedProgress(Progress):
    """Progress through a plan: everything follows from the number of batches handed out."""

    def __init__(self, plan: Plan, rank: int) -> None:
        super().__init__()
        self._plan = plan
        self._batches = plan.num_batches(rank)

    def _counts(self) -> BatchCounts:
        return self._plan.counts(self.handed - 1)

    @property
    def samples(self) -> int:
        """See `Progress.samples`."""
        return self._plan.samples_after(self.handed)

    @property
    def ended(self) -> bool:
        """See `Progress.ended`."""
        return self.handed >= self._plan.rounds

    @property
    def remaining(self) -> int | None:
        """See `Progress.remaining`."""
        return self._batches - self.handed


@dataclass(frozen=True, slots=True)
class Round:
    """One global batch.

    Attributes:
        counts: Samples per rank.
        samples: Position in the epoch after it.
        is_last: Tells whether this rank gets no batch after it; may wait for other ranks.
        ends: Tells whether no rank gets a batch after it; None if that is the same.
        stream: State of the stream after it, where the stream has one.
    """

    counts: BatchCounts
    samples: int
    is_last: Callable[[], bool]
    ends: Callable[[], bool] | None = None
    stream: dict[str, Any] | None = None


def known(value: bool) -> Callable[[], bool]:
    """Return a function that gives an answer which is there already."""
    return _yes if value else _no


def _yes() -> bool:
    return True


def _no() -> bool:
    return False


class RecordedProgress(Progress):
    """Progress through batches that are only known once they are read.

    Args:
        samples: Position at which the pass begins.
    """

    def __init__(self, samples: int) -> None:
        super().__init__()
        self._start = samples
        self._waiting: deque[Round] = deque()
        self._current: Round | None = None

    def record(self, current: Round) -> None:
        """Note a batch that will be handed out after those noted before."""
        self._waiting.append(current)

    def hand_out(self) -> None:
        """See `Progress.hand_out`."""
        self._current = self._waiting.popleft()
        self.handed += 1

    def _counts(self) -> BatchCounts:
        assert self._current is not None
        return self._current.counts

    @property
    def samples(self) -> int:
        """See `Progress.samples`."""
        return self._start if self._current is None else self._current.samples

    @property
    def ended(self) -> bool:
        """See `Progress.ended`."""
        current = self._current
        return current is not None and (current.ends or current.is_last)()

    @property
    def stream(self) -> dict[str, Any] | None:
        """See `Progress.stream`."""
        return None if self._current is None else self._current.stream

    @property
    def remaining(self) -> int | None:
        """See `Progress.remaining`: 0 or None."""
        return 0 if self._current is not None and self._current.is_last() else None
