"""Reads ahead in chunks, so that the ranks need not exchange something for every batch."""

from __future__ import annotations

import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from paceline.collectives.nested import leaves
from paceline.data.iteration_progress import IterationProgress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from paceline.collectives import BatchCounts

__all__ = ["Chunk", "ChunkProgress", "ReadAhead", "num_bytes"]

# An exchange between two processes of a machine takes about 0.2 ms, which is 1 % once in 20 ms. If it takes longer, a
# chunk may take up to 0.1 s, to keep the exchange at 2 %.
CHUNK_SECONDS, MAX_CHUNK_SECONDS = 0.02, 0.1
EXCHANGE_SHARE = 0.02
# How much larger than the last a chunk may be, within the time it may take: an epoch of a thousand small batches has
# six exchanges. With 4 it has nine, which take a third of an epoch of 10 ms.
GROWTH = 16
# Larger chunks would be evicted from the processor's caches before they are used.
MAX_BATCHES = 512
MAX_BYTES = 32 * 2**20


class ReadAhead:
    """Decides how many global batches the next chunk has.

    At first two, or what the iteration before suggests; later up to sixteen times as many as the last. Always within
    `CHUNK_SECONDS`, `MAX_BYTES` and `MAX_BATCHES`: a slow stream, or a loop with long steps, is read one batch ahead.

    Args:
        before: That of the iteration before, if there was one.

    Attributes:
        exchange_seconds: Time that the last exchange took on this rank; the caller sets it.
        batch_seconds: Time that a global batch takes, with its step; None while that is unknown.
    """

    def __init__(self, before: ReadAhead | None = None) -> None:
        self._size = 1
        self._last_call = time.perf_counter()
        self.exchange_seconds = 0.0
        self.batch_seconds: float | None = None if before is None else before.batch_seconds

    def next_size(self, num_yielded: int, example: Any) -> int:
        """Return how many global batches to read.

        Args:
            num_yielded: Global batches yielded since the last call.
            example: What is in memory of one of them, to estimate its size.
        """
        now = time.perf_counter()
        elapsed, self._last_call = now - self._last_call, now
        size = min(MAX_BATCHES, MAX_BYTES // max(1, num_bytes(example)))
        seconds = CHUNK_SECONDS
        if num_yielded:
            self.batch_seconds = max(elapsed, 1e-9) / num_yielded
            seconds = min(MAX_CHUNK_SECONDS, max(CHUNK_SECONDS, self.exchange_seconds / EXCHANGE_SHARE))
            size = min(size, GROWTH * self._size)
        size = min(size, 2 if self.batch_seconds is None else int(seconds / self.batch_seconds))
        self._size = max(1, size)
        return self._size


def num_bytes(batch: Any) -> int:
    """Estimate the memory of a batch; an object of unknown size counts as a megabyte."""
    total = 0
    for _, leaf in leaves(batch):
        # Sparse tensors raise if they are asked for their bytes.
        is_sparse = isinstance(leaf, torch.Tensor) and leaf.layout is not torch.strided
        size = None if is_sparse else getattr(leaf, "nbytes", None)
        if isinstance(size, int):
            total += size
        elif leaf is None or isinstance(leaf, str | bytes | bytearray | bool | int | float | complex):
            total += sys.getsizeof(leaf)
        else:
            total += 2**20
    return total


@dataclass(slots=True)
class Chunk:
    """Consecutive global batches that this rank knows everything about.

    Attributes:
        num_batches: How many of them have a batch for this rank.
        counts: Samples per rank, of each or one for all.
        states: The state of the stream after each, if it has one.
    """

    num_batches: int
    counts: Sequence[BatchCounts] | BatchCounts
    states: list[dict[str, Any] | None] | None = None

    def counts_of(self, index: int) -> BatchCounts:
        """Return the samples per rank of one global batch."""
        return self.counts[index] if isinstance(self.counts, list | tuple) else self.counts  # type: ignore[return-value]

    def samples(self, num_batches: int) -> int:
        """Return the samples in the first `num_batches` global batches."""
        if isinstance(self.counts, list | tuple):
            return sum(sum(counts.real) for counts in self.counts[:num_batches])
        return num_batches * sum(self.counts.real)  # type: ignore[union-attr]


class ChunkProgress(IterationProgress):
    """Progress through chunks, each of which is added before its first batch is yielded.

    Args:
        samples: Position at which the iteration begins.
        more: Returns whether this rank gets a batch after those of all chunks added; adds the next chunk if so.
        ends: Returns, if it gets none, whether no other rank does either.
    """

    def __init__(self, samples: int, more: Callable[[], bool], ends: Callable[[], bool]) -> None:
        super().__init__()
        self._more = more
        self._ends = ends
        self._chunks: deque[Chunk] = deque()
        # Global batches before the first chunk, and the position there.
        self._dropped = 0
        self._samples = samples
        # Global batches in all chunks added.
        self._known = 0

    def add(self, chunk: Chunk) -> None:
        """Add the chunk after those added before."""
        self._drop_finished_chunks()
        self._chunks.append(chunk)
        self._known += chunk.num_batches

    def _drop_finished_chunks(self) -> None:
        """Drop the chunks before the current batch."""
        while self._chunks and self.num_yielded > self._dropped + self._chunks[0].num_batches:
            chunk = self._chunks.popleft()
            self._dropped += chunk.num_batches
            self._samples += chunk.samples(chunk.num_batches)

    def _counts(self) -> BatchCounts:
        self._drop_finished_chunks()
        return self._chunks[0].counts_of(self.num_yielded - self._dropped - 1)

    @property
    def samples(self) -> int:
        """See `IterationProgress.samples`."""
        self._drop_finished_chunks()
        return self._samples + (self._chunks[0].samples(self.num_yielded - self._dropped) if self._chunks else 0)

    @property
    def stream(self) -> dict[str, Any] | None:
        """See `IterationProgress.stream`."""
        self._drop_finished_chunks()
        if not self.num_yielded or self._chunks[0].states is None:
            return None
        return self._chunks[0].states[self.num_yielded - self._dropped - 1]

    @property
    def remaining(self) -> int | None:
        """See `IterationProgress.remaining`: 0 or None."""
        return None if self.num_yielded < self._known or self._more() else 0

    @property
    def ended(self) -> bool:
        """See `IterationProgress.ended`."""
        return self.num_yielded > 0 and self.remaining == 0 and self._ends()
