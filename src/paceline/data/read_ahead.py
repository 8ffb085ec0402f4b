"""Reads ahead in chunks: as far as spares the ranks an exchange for every batch, and no further."""

from __future__ import annotations

import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paceline.collectives.nested import leaves
from paceline.data.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from paceline.collectives import BatchCounts

__all__ = ["Chunk", "ChunkProgress", "ReadAhead", "num_bytes"]

# One exchange between two processes of a machine costs about 0.2 ms of each; once in 20 ms that is a hundredth. Where
# it takes longer, a chunk may take up to 0.1 s, so that it stays a small part.
SECONDS, MOST_SECONDS = 0.02, 0.1
SHARE = 0.02
# More in a row would leave the caches of a processor before they are used.
ROUNDS = 256
BYTES = 32 * 2**20


class ReadAhead:
    """Says how many global batches the next chunk takes.

    Up to twice as many as the last, and no more than what `SECONDS`, `BYTES` and `ROUNDS` allow: a stream that is slow,
    or a step that takes long, is read one batch ahead.

    Attributes:
        spent: Seconds that the last exchange took of this rank; whoever makes it says so.
    """

    def __init__(self) -> None:
        self._size = 1
        self._before = time.perf_counter()
        self.spent = 0.0

    def next_size(self, rounds: int, example: Any) -> int:
        """Return how many global batches to take.

        Args:
            rounds: How many were handed out since this was asked last.
            example: What is held in memory of one of them.
        """
        now = time.perf_counter()
        passed, self._before = now - self._before, now
        wanted = min(2 * self._size, ROUNDS, BYTES // max(1, num_bytes(example)))
        if rounds:
            seconds = min(MOST_SECONDS, max(SECONDS, self.spent / SHARE))
            wanted = min(wanted, int(seconds * rounds / max(passed, 1e-9)))
        self._size = max(1, wanted)
        return self._size


def num_bytes(batch: Any) -> int:
    """Estimate the memory that a batch takes; what nobody can look into counts as a megabyte."""
    total = 0
    for _, leaf in leaves(batch):
        size = getattr(leaf, "nbytes", None)
        if isinstance(size, int):
            total += size
        elif leaf is None or isinstance(leaf, str | bytes | bytearray | bool | int | float | complex):
            total += sys.getsizeof(leaf)
        else:
            total += 2**20
    return total


@dataclass(slots=True)
class Chunk:
    """Global batches in a row, of which this rank knows everything.

    Attributes:
        rounds: How many there are for this rank.
        counts: Of each, or one for all.
        states: The state of the stream after each, where it has one.
    """

    rounds: int
    counts: Sequence[BatchCounts] | BatchCounts
    states: list[dict[str, Any] | None] | None = None

    def counts_of(self, index: int) -> BatchCounts:
        """Return the counts of one global batch."""
        return self.counts[index] if isinstance(self.counts, list | tuple) else self.counts  # type: ignore[return-value]

    def samples(self, rounds: int) -> int:
        """Return the samples in the first so many global batches."""
        if isinstance(self.counts, list | tuple):
            return sum(sum(counts.real) for counts in self.counts[:rounds])
        return rounds * sum(self.counts.real)  # type: ignore[union-attr]


class ChunkProgress(Progress):
    """Progress through chunks, each of which is added before its first batch is handed out.

    Args:
        samples: Position at which the pass begins.
        more: Tells whether this rank gets a batch after those of all chunks added; adds the next chunk if so.
        ends: Tells, where it gets none, whether no other rank does.
    """

    def __init__(self, samples: int, more: Callable[[], bool], ends: Callable[[], bool]) -> None:
        super().__init__()
        self._more = more
        self._ends = ends
        self._chunks: deque[Chunk] = deque()
        # Global batches before the first chunk, and the position there.
        self._before = 0
        self._samples = samples
        self._known = 0

    def add(self, chunk: Chunk) -> None:
        """Note the chunk after those noted before."""
        self._forget()
        self._chunks.append(chunk)
        self._known += chunk.rounds

    def _forget(self) -> None:
        """Drop chunks before the one whose batch is in use."""
        while self._chunks and self.handed > self._before + self._chunks[0].rounds:
            passed = self._chunks.popleft()
            self._before += passed.rounds
            self._samples += passed.samples(passed.rounds)

    def _counts(self) -> BatchCounts:
        self._forget()
        return self._chunks[0].counts_of(self.handed - self._before - 1)

    @property
    def samples(self) -> int:
        """See `Progress.samples`."""
        self._forget()
        return self._samples + (self._chunks[0].samples(self.handed - self._before) if self._chunks else 0)

    @property
    def stream(self) -> dict[str, Any] | None:
        """See `Progress.stream`."""
        self._forget()
        if not self.handed or self._chunks[0].states is None:
            return None
        return self._chunks[0].states[self.handed - self._before - 1]

    @property
    def remaining(self) -> int | None:
        """See `Progress.remaining`: 0 or None."""
        return None if self.handed < self._known or self._more() else 0

    @property
    def ended(self) -> bool:
        """See `Progress.ended`."""
        return self.handed > 0 and self.remaining == 0 and self._ends()
