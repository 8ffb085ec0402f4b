"""Data sets that count what is asked of them, and ranks that are only a number."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from paceline.collectives import Group, SoloGroup
from paceline.config import DataLoaderConfiguration
from paceline.data import ActiveLoaders, PreparedDataLoader, prepare_loader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Seat(SoloGroup):
    """A rank among `size` that exchanges nothing: for what needs no exchange."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size


class Numbers(Dataset[int]):
    """Yields its indices and counts the reads."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.reads = 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        self.reads += 1
        return index


class PlainStream(IterableDataset[int]):
    """Knows nothing of readers."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        yield from range(self.size)


class SplittingStream(IterableDataset[int]):
    """Splits itself over the readers that it is told of, as PyTorch's documentation says."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        step, first = (1, 0) if info is None else (info.num_workers, info.id)
        yield from range(first, self.size, step)


class ShuffledStream(IterableDataset[int]):
    """Shuffles with the global `random`, and knows nothing of readers."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        items = list(range(self.size))
        random.shuffle(items)
        yield from items


# Whole numbers below a bound, drawn from a global generator.
DRAWS: dict[str, Callable[[int], int]] = {
    "random": random.randrange,
    "torch": lambda number: int(torch.randint(number, ())),
    "numpy": lambda number: int(np.random.randint(number)),
    # One of a pair: the other is kept for the next call.
    "numpy's normal numbers": lambda number: int(abs(np.random.randn()) * 100) % number,
}


class BufferShuffledStream(IterableDataset[int]):
    """Shuffles in a buffer of four items, with one of the global generators."""

    def __init__(self, size: int, draw: Callable[[int], int]) -> None:
        self.size = size
        self.draw = draw

    def __iter__(self) -> Iterator[int]:
        buffer: list[int] = []
        for item in range(self.size):
            buffer.append(item)
            if len(buffer) == 4:
                yield buffer.pop(self.draw(4))
        yield from buffer


class NoisyStream(IterableDataset[int]):
    """Draws from every global generator for each item."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.start = self.position = 0

    def __iter__(self) -> Iterator[int]:
        start, self.start = self.start, 0
        for item in range(start, self.size):
            self.position = item + 1
            noise = [draw(1000) for draw in DRAWS.values()]
            yield item * 1000 + sum(noise) % 1000


class StatefulNoisyStream(NoisyStream):
    """The same with a state, which says nothing about the generators."""

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = self.position = state["position"]


class ShardedStream(IterableDataset[int]):
    """Shards as those of `datasets`: rank by `shard`, workers by `get_worker_info`."""

    def __init__(self, shards: list[list[int]]) -> None:
        self.shards = shards
        self.asked: list[tuple[int, int]] = []

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    def shard(self, num_shards: int, index: int) -> ShardedStream:
        self.asked.append((num_shards, index))
        return ShardedStream(self.shards[index::num_shards])

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        step, first = (1, 0) if info is None else (info.num_workers, info.id)
        for shard in self.shards[first::step]:
            yield from shard


def prepared(
    loader: Any,
    group: Group | None = None,
    active: ActiveLoaders | None = None,
    device: torch.device | None = None,
    **config: Any,
) -> PreparedDataLoader:
    config.setdefault("data_seed", 7)
    return prepare_loader(
        loader,
        group=group or SoloGroup(),
        device=device,
        config=DataLoaderConfiguration(**config),
        active=active or ActiveLoaders(),
    )


def ids(loader: Any) -> list[list[int]]:
    """Run an epoch; return its batches as lists."""
    return [batch.tolist() for batch in loader]


def real_ids(loader: PreparedDataLoader, rank: int = 0) -> list[int]:
    """Run an epoch; return the samples without padding."""
    found: list[int] = []
    for batch in loader:
        assert len(batch) == loader.counts.rows[rank]
        found += batch[: loader.counts.real[rank]].tolist()
    return found
