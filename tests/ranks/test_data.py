"""Loaders on real ranks over gloo, with real workers."""

from __future__ import annotations

import random
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from paceline.collectives import TorchGroup, gather_samples
from tests.support.engines import slowly
from tests.support.ranks import run_on_ranks
from tests.unit.data.support import (
    DRAWS,
    BufferShuffledStream,
    NoisyStream,
    Numbers,
    PlainStream,
    ShardedStream,
    ShuffledStream,
    SplittingStream,
    StatefulNoisyStream,
    ids,
    prepared,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def read_stream(stream: Any, workers: int, config: dict[str, Any]) -> dict[str, Any]:
    group = TorchGroup()
    settings: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
    loader = prepared(DataLoader(stream, 3, **settings), group, **config)
    passes = []
    for _ in range(2):
        own, gathered, batches = [], [], 0
        for batch in loader:
            batches += 1
            own += batch[: loader.counts.real[group.rank]].tolist()
            gathered += gather_samples(group, batch, loader.counts).tolist()
        passes.append({"own": own, "gathered": gathered, "batches": batches})
    return {"passes": passes, "describe": loader.describe()}


STREAMS: dict[str, Callable[[], Any]] = {
    "shards": lambda: ShardedStream([list(range(s, 50, 5)) for s in range(5)]),
    "few shards": lambda: ShardedStream([list(range(50))]),
    "splits itself": lambda: SplittingStream(50),
    "plain": lambda: PlainStream(50),
    "plain, shuffled by random": lambda: ShuffledStream(50),
}


@pytest.mark.parametrize(
    ("name", "workers"),
    [*[(name, 0) for name in STREAMS], ("shards", 2), *slowly([(name, 2) for name in STREAMS if name != "shards"])],
)
def test_two_ranks_read_every_item_of_a_stream_once(name: str, workers: int) -> None:
    results = run_on_ranks(2, read_stream, STREAMS[name](), workers, {})
    for number in range(2):
        passes = [result["passes"][number] for result in results]
        assert sorted(passes[0]["own"] + passes[1]["own"]) == list(range(50))
        assert passes[0]["own"]
        assert passes[1]["own"]
        assert sorted(passes[0]["gathered"]) == list(range(50))
        assert passes[0]["gathered"] == passes[1]["gathered"]
        assert passes[0]["batches"] == passes[1]["batches"]


@pytest.mark.parametrize("draw", ["numpy's normal numbers", *slowly(["random", "torch", "numpy"])])
def test_several_ranks_share_the_order_that_one_process_has(draw: str) -> None:
    single = read_alone(BufferShuffledStream(24, DRAWS[draw]))
    first, second = (result["passes"] for result in run_on_ranks(2, read_buffer_shuffled, draw))
    for number in range(2):
        pairs = zip(first[number]["own"], second[number]["own"], strict=True)
        assert [item for pair in pairs for item in pair] == single[number]


def read_alone(stream: Any) -> list[list[int]]:
    loader = prepared(DataLoader(stream, 6))
    return [[item for batch in ids(loader) for item in batch] for _ in range(2)]


def read_buffer_shuffled(draw: str) -> dict[str, Any]:
    return read_stream(BufferShuffledStream(24, DRAWS[draw]), 0, {})


def test_a_stream_that_is_split_already_is_not_split_again() -> None:
    results = run_on_ranks(2, read_stream, PlainStream(20), 0, {"streams_are_sharded": True})
    assert [result["passes"][0]["own"] for result in results] == [list(range(20))] * 2


class RandomOrder(Sampler[int]):
    def __len__(self) -> int:
        return 30

    def __iter__(self) -> Iterator[int]:
        order = list(range(30))
        random.shuffle(order)
        return iter(order)


def read_sampled(workers: int) -> list[list[int]]:
    group = TorchGroup()
    random.seed(group.rank)
    torch.manual_seed(group.rank)
    loader = prepared(DataLoader(Numbers(30), 4, sampler=RandomOrder(), num_workers=workers), group, data_seed=None)
    ids(loader)
    return ids(loader)


def test_ranks_seeded_differently_agree_on_the_order() -> None:
    whole = [n for part in run_on_ranks(2, read_sampled, 0) for batch in part for n in batch]
    assert set(whole) == set(range(30))
    # 30 samples in global batches of 8: 2 samples of padding.
    assert len(whole) == 32


def read_dispatched(stream: bool, workers: int) -> dict[str, Any]:
    group = TorchGroup()
    data: Any = PlainStream(11) if stream else Numbers(11)
    loader = prepared(DataLoader(data, 2, num_workers=workers), group, dispatch_batches=True)
    batches, gathered = [], []
    for batch in loader:
        batches.append(batch.tolist())
        gathered += gather_samples(group, batch, loader.counts).tolist()
    return {"batches": batches, "gathered": gathered, "reads": getattr(data, "reads", 0)}


@pytest.mark.parametrize(("stream", "workers"), [(False, 0), (True, 0), (False, 2)])
def test_rank_0_reads_for_all(stream: bool, workers: int) -> None:
    first, second = run_on_ranks(2, read_dispatched, stream, workers)
    assert first["batches"][:2] == [[0, 1], [4, 5]]
    assert second["batches"][:2] == [[2, 3], [6, 7]]
    assert sorted(first["gathered"]) == sorted(second["gathered"]) == list(range(11))
    assert second["reads"] == 0


def save_then_resume(stop: int, workers: int) -> list[list[int]]:
    group = TorchGroup()

    def make(workers: int) -> Any:
        settings: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
        return prepared(DataLoader(Numbers(50), 4, shuffle=True, **settings), group)

    whole, loader, again = make(0), make(workers), make(workers)
    first, second = ids(whole), ids(whole)
    seen = []
    for batch in loader:
        seen.append(batch.tolist())
        if len(seen) == stop:
            break
    again.load_state_dict(loader.state_dict())
    assert [*seen, *ids(again)] == first
    assert ids(again) == second
    return first


def test_resume_equals_never_stopped_on_two_ranks() -> None:
    results = run_on_ranks(2, save_then_resume, 3, 2)
    assert {n for rank in results for batch in rank for n in batch} == set(range(50))


class Uneven(Sampler[list[int]]):
    """Batches of two and of four, shuffled."""

    def __len__(self) -> int:
        return 9

    def __iter__(self) -> Iterator[list[int]]:
        batches = [list(range(start, start + 2)) for start in range(0, 14, 2)] + [[14, 15, 16, 17], [18, 19, 20, 21]]
        random.shuffle(batches)
        return iter(batches)


NOISY: dict[str, Any] = {"noise": NoisyStream, "noise beside a state": StatefulNoisyStream}


def resume_anywhere(kind: str, workers: int, config: dict[str, Any], drop_last: bool) -> None:
    """In the first epoch, the second, and at their ends; with `set_epoch` of the user's as well."""
    group = TorchGroup()
    settings: dict[str, Any] = {"num_workers": workers, **({"prefetch_factor": 4} if workers else {})}

    def make() -> Any:
        if kind == "uneven":
            return prepared(DataLoader(Numbers(22), batch_sampler=Uneven(), **settings), group, **config)
        if kind in NOISY:
            return prepared(DataLoader(NOISY[kind](22), 4, drop_last=drop_last, **settings), group, **config)
        return prepared(DataLoader(Numbers(22), 4, shuffle=True, drop_last=drop_last, **settings), group, **config)

    loader, seen, states = make(), [], []
    for epoch in range(2):
        loader.set_epoch(epoch)
        for batch in loader:
            seen.append(batch.tolist())
            states.append((epoch, loader.state_dict()))
    following = ids(loader)
    places = range(len(states)) if not workers else (1, len(states) - 1)
    for place in places:
        epoch, state = states[place]
        again = make()
        again.load_state_dict(state)
        again.set_epoch(epoch)
        rest: list[Any] = []
        while len(rest) < len(seen) - place - 1 + len(following):
            rest += ids(again)
        assert rest == [*seen[place + 1 :], *following], place


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("kind", "workers", "config", "drop_last"),
    [
        ("shuffled", 0, {}, False),
        pytest.param("shuffled", 2, {}, True, marks=pytest.mark.slow),
        ("shuffled", 0, {"split_batches": True}, False),
        ("shuffled", 0, {"dispatch_batches": True}, False),
        pytest.param("shuffled", 2, {"dispatch_batches": True, "split_batches": True}, False, marks=pytest.mark.slow),
        # Ranks that end separately count other batches, so that only orders that need no exchange can be compared.
        ("shuffled", 0, {"even_batches": False}, False),
        ("uneven", 0, {}, False),
        ("uneven", 0, {"split_batches": True}, False),
        ("uneven", 0, {"dispatch_batches": True}, False),
        *[(kind, 0, config, False) for kind in NOISY for config in ({}, {"dispatch_batches": True})],
    ],
)
def test_resume_is_exact_anywhere(ranks: int, kind: str, workers: int, config: dict[str, Any], drop_last: bool) -> None:
    run_on_ranks(ranks, resume_anywhere, kind, workers, config, drop_last)


class OneBuffer(IterableDataset[Any]):
    """Writes every item into the same array; `fixed` is the same in all items."""

    def __init__(self) -> None:
        self.buffer, self.fixed = np.zeros(4, dtype=np.float32), torch.ones(3)

    def __iter__(self) -> Iterator[Any]:
        for number in range(COUNT):
            self.buffer[...] = number
            yield {"x": self.buffer, "fixed": self.fixed}


class RingOfBuffers(IterableDataset[Any]):
    """Writes items into the arrays of a ring, one after another."""

    def __init__(self, size: int) -> None:
        self.buffers = [np.zeros(4, dtype=np.float32) for _ in range(size)]

    def __iter__(self) -> Iterator[Any]:
        for number in range(COUNT):
            buffer = self.buffers[number % len(self.buffers)]
            buffer[...] = number
            yield {"x": buffer}


class OneBufferByIndex(Dataset[Any]):
    """Writes every sample into the same array."""

    def __init__(self) -> None:
        self.buffer = np.zeros(4, dtype=np.float32)

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Any:
        self.buffer[...] = index
        return {"x": self.buffer}


COUNT = 13


def the_only(samples: list[Any]) -> Any:
    return {name: torch.as_tensor(value)[None] for name, value in samples[0].items()}


def read_one_buffer(kind: type[Any], batch_size: int | None, dispatches: bool | None) -> list[float]:
    """What a loop saw of each batch while it had it."""
    group = TorchGroup()
    collate = the_only if batch_size else None
    loader = prepared(DataLoader(kind(), batch_size, collate_fn=collate), group, dispatch_batches=dispatches)
    seen = []
    for batch in loader:
        counts = loader.counts
        if not counts.counted or counts.real[group.rank]:
            seen.append(float(torch.as_tensor(batch["x"]).flatten()[0]))
    return seen


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("kind", "batch_size", "dispatches"),
    [
        (OneBuffer, None, None),
        *[(partial(RingOfBuffers, size), 1, dispatches) for size in (2, 3, 4) for dispatches in (False, True)],
        (OneBuffer, 1, False),
        (OneBuffer, 1, True),
        (OneBufferByIndex, 1, None),
        (OneBufferByIndex, 1, True),
    ],
)
def test_a_data_set_may_write_each_batch_into_the_same_memory(
    kind: type[Any], batch_size: int | None, dispatches: bool | None, ranks: int
) -> None:
    seen = run_on_ranks(ranks, read_one_buffer, kind, batch_size, dispatches)
    assert sorted({number for own in seen for number in own}) == list(range(COUNT))
