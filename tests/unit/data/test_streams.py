"""Streams and dispatching among make-believe ranks; each rank's stream is its own, so that they differ."""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, get_worker_info

from paceline.collectives import FakeGroup, Group, SoloGroup, gather_samples, run_fake_ranks
from paceline.config import DataLoaderConfiguration
from paceline.data.active_loaders import ActiveLoaders
from paceline.data.prepare import prepare_loader
from paceline.data.randomness import IsolatedRng
from paceline.data.worker_split import StreamShard
from paceline.errors import CollectiveError, DataError
from tests.unit.data.support import (
    DRAWS,
    BufferShuffledStream,
    Numbers,
    PlainStream,
    ShardedStream,
    SplittingStream,
    ids,
    prepared,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Items(IterableDataset[int]):
    def __init__(self, items: list[int]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[int]:
        yield from self.items


def walk(loader: Any, group: Group, gathered: bool = True) -> tuple[list[list[int]], list[Any], list[int]]:
    """Run an epoch; return the batches, the counts and what gather_samples makes of the batches."""
    batches, counts, samples = [], [], []
    ends = []
    for batch in loader:
        batches.append(batch.tolist())
        counts.append(loader.counts)
        ends.append(loader.end_of_dataloader)
        if gathered:
            samples += gather_samples(group, batch, loader.counts).tolist()
    assert ends == [False] * (len(ends) - 1) + [True] * bool(ends)
    return batches, counts, samples


@pytest.mark.parametrize("lengths", [(5, 2), (0, 7), (4, 4), (1, 6, 3), (2, 0, 0), (9, 1)])
def test_streams_of_different_lengths_end_together(lengths: tuple[int, ...]) -> None:
    def run(group: FakeGroup) -> Any:
        part = [100 * group.rank + n for n in range(lengths[group.rank])]
        return walk(prepared(DataLoader(Items(part), 2), group, streams_are_sharded=True), group)

    results = run_fake_ranks(len(lengths), run)
    expected = sorted(100 * rank + n for rank, length in enumerate(lengths) for n in range(length))
    assert len({len(batches) for batches, _, _ in results}) == 1
    for rank, (batches, counts, samples) in enumerate(results):
        assert all(len(batch) == 2 for batch in batches)
        assert all(c.rows == (2,) * len(lengths) for c in counts)
        assert sum(c.real[rank] for c in counts) == lengths[rank]
        assert sorted(samples) == expected


def test_uneven_streams_end_by_themselves() -> None:
    def run(group: FakeGroup) -> Any:
        part = list(range([7, 2, 0][group.rank]))
        loader = prepared(DataLoader(Items(part), 2), group, streams_are_sharded=True, even_batches=False)
        return walk(loader, group, gathered=False)[0]

    assert run_fake_ranks(3, run) == [[[0, 1], [2, 3], [4, 5], [6]], [[0, 1]], []]


def test_drop_last_stops_all_ranks_before_an_incomplete_round() -> None:
    def run(group: FakeGroup) -> Any:
        part = list(range([7, 5][group.rank]))
        loader = prepared(DataLoader(Items(part), 2, drop_last=True), group, streams_are_sharded=True)
        return walk(loader, group)[0]

    assert run_fake_ranks(2, run) == [[[0, 1], [2, 3]], [[0, 1], [2, 3]]]


def test_padding_takes_ragged_and_untensored_samples_along() -> None:
    def collate(items: list[int]) -> dict[str, Any]:
        width = max(items) + 1
        return {"x": torch.zeros(len(items), width), "name": [f"n{n}" for n in items], "width": width}

    def run(group: FakeGroup) -> Any:
        part = [[4, 1, 2], [3]][group.rank]
        loader = prepared(DataLoader(Items(part), 2, collate_fn=collate), group, streams_are_sharded=True)
        return [(batch["x"].shape, batch["name"], batch["width"]) for batch in loader]

    first, second = run_fake_ranks(2, run)
    assert first == [((2, 5), ["n4", "n1"], 5), ((2, 3), ["n2", "n2"], 3)]
    assert second == [((2, 4), ["n3", "n3"], 4)] * 2


@pytest.mark.parametrize("config", [{}, {"dispatch_batches": True}])
@pytest.mark.parametrize("data", [Numbers(7), PlainStream(7)])
def test_sparse_batches_arrive_and_cannot_be_gathered(data: Any, config: dict[str, Any]) -> None:
    def sparse(samples: list[int]) -> torch.Tensor:
        return torch.tensor(samples).to_sparse()

    def run(group: FakeGroup) -> list[int]:
        found = []
        loader = prepared(DataLoader(data, 2, collate_fn=sparse), group, **config)
        for batch in loader:
            assert batch.layout is torch.sparse_coo
            found += batch.to_dense()[: loader.counts.real[group.rank]].tolist()
            with pytest.raises(CollectiveError, match=r"layout torch\.sparse_coo"):
                gather_samples(group, batch, loader.counts)
        return found

    assert sorted(itertools.chain.from_iterable(run_fake_ranks(2, run))) == list(range(7))


def test_no_rank_has_anything() -> None:
    def run(group: FakeGroup) -> None:
        with pytest.raises(DataError, match="has no batch"):
            ids(prepared(DataLoader(Items([]), 2), group, streams_are_sharded=True))

    run_fake_ranks(2, run)


def test_a_stream_goes_on_where_it_was_on_every_rank() -> None:
    def run(group: FakeGroup, stop: int) -> Any:
        def make() -> Any:
            part = [100 * group.rank + n for n in range([5, 2][group.rank])]
            return prepared(DataLoader(Items(part), 2), group, streams_are_sharded=True)

        whole, loader, again = ids(make()), make(), make()
        for number, _ in enumerate(loader, 1):
            if number == stop:
                break
        again.load_state_dict(loader.state_dict())
        rest = ids(again) if stop < 3 else []
        assert rest == whole[stop:]

    for stop in (1, 2):
        run_fake_ranks(2, lambda group, stop=stop: run(group, stop))  # type: ignore[misc]


@pytest.mark.parametrize("stream", [PlainStream, SplittingStream])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_parts_of_all_ranks_are_the_stream(stream: Any, size: int) -> None:
    parts = [list(StreamShard(stream(11), rank, size, 0)) for rank in range(size)]
    assert sorted(itertools.chain(*parts)) == list(range(11))
    assert [len(part) for part in parts] == [len(range(rank, 11, size)) for rank in range(size)]


def test_the_true_worker_info_is_there_between_items() -> None:
    items = iter(StreamShard(SplittingStream(6), 1, 2, 0))
    for _ in items:
        assert get_worker_info() is None


def test_a_data_set_that_asks_too_late_is_refused() -> None:
    class Late(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            yield 0
            info = get_worker_info()
            yield from range(1 + (info.id if info else 0), 9, info.num_workers if info else 1)

    with pytest.raises(DataError, match="Late read num_workers after its first item"):
        list(StreamShard(Late(), 0, 2, 0))


def test_a_stream_of_shards_is_asked_for_this_ranks() -> None:
    for shards, size in ((4, 2), (3, 2), (1, 2), (2, 3)):
        stream = ShardedStream([[10 * s + n for n in range(3)] for s in range(shards)])

        def run(group: FakeGroup, stream: ShardedStream = stream) -> Any:
            return walk(prepared(DataLoader(stream, 2), group), group)

        # Threads of one process share the worker info, which streams with too few shards are shown.
        results = run_fake_ranks(size, run)
        for _, counts, samples in results:
            assert sorted(samples) == sorted(itertools.chain(*stream.shards))
            assert all(sum(c.real[rank] for c in counts) for rank in range(size))
        assert sorted(stream.asked) == ([(size, rank) for rank in range(size)] if shards >= size else [])


def test_a_stream_tells_how_it_is_split() -> None:
    def run(group: FakeGroup) -> str:
        return prepared(DataLoader(PlainStream(9), 2), group).describe()

    assert "stream split over 2 ranks x 1 readers" in run_fake_ranks(2, run)[0]
    assert "global batch of 4 samples = 2 ranks x 2 samples" in run_fake_ranks(2, run)[1]


class Untouchable(Numbers):
    """Must not be read, nor even asked for its length."""

    def __len__(self) -> int:
        raise AssertionError("len was called")

    def __getitem__(self, index: int) -> int:
        raise AssertionError("read")


@pytest.mark.parametrize(
    ("samples", "batch", "config", "drop_last"),
    [
        (9, 2, {}, False),
        (9, 4, {"split_batches": True}, False),
        (9, 2, {"even_batches": False}, False),
        (5, 2, {"even_batches": False}, False),
        (1, 2, {"even_batches": False}, False),
        (9, 2, {}, True),
        (3, 4, {}, False),
        (16, 2, {}, False),
    ],
)
@pytest.mark.parametrize("shuffle", [True, False])
def test_dispatched_batches_are_those_that_ranks_would_read(
    samples: int, batch: int, config: dict[str, Any], drop_last: bool, shuffle: bool
) -> None:
    def run(group: FakeGroup, dispatch: bool) -> Any:
        data: Any = Untouchable(samples) if dispatch and group.rank else Numbers(samples)
        sampler = torch.utils.data.RandomSampler(Numbers(samples)) if shuffle else None
        if sampler is None and group.rank and dispatch:
            sampler = torch.utils.data.SequentialSampler(Numbers(samples))  # type: ignore[assignment]
        loader = DataLoader(data, batch, sampler=sampler, drop_last=drop_last)
        ready = prepared(loader, group, dispatch_batches=dispatch, **config)
        batches, counts, _ = walk(ready, group, gathered=False)
        return batches, counts, len(ready), ready.total_dataset_length, ready.total_batch_size

    dispatched = run_fake_ranks(2, lambda group: run(group, True))
    assert dispatched == run_fake_ranks(2, lambda group: run(group, False))


@pytest.mark.parametrize(("config", "drop_last", "expected"), [
    ({}, False, [[[0, 1], [4, 5], [8, 8]], [[2, 3], [6, 7], [8, 8]]]),
    ({"split_batches": True}, False, [[[0], [2], [4], [6], [8]], [[1], [3], [5], [7], [8]]]),
    ({"even_batches": False}, False, [[[0, 1], [4, 5], [8]], [[2, 3], [6, 7]]]),
    ({}, True, [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]),
])  # fmt: skip
def test_a_dispatched_stream(config: dict[str, Any], drop_last: bool, expected: Any) -> None:
    def run(group: FakeGroup) -> Any:
        data = Items(list(range(9)) if group.rank == 0 else [])
        loader = DataLoader(data, 2, drop_last=drop_last)
        gathered = config.get("even_batches", True)
        batches, _, samples = walk(prepared(loader, group, dispatch_batches=True, **config), group, gathered)
        if gathered:
            assert sorted(samples) == list(range(8 if drop_last else 9))
        return batches

    assert run_fake_ranks(2, run) == expected


def test_a_dispatched_pass_is_resumed_exactly() -> None:
    def run(group: FakeGroup) -> None:
        def make() -> Any:
            return prepared(DataLoader(Numbers(20), 3, shuffle=True), group, dispatch_batches=True)

        whole, loader = make(), make()
        first, second = ids(whole), ids(whole)
        for number, _ in enumerate(loader, 1):
            if number == 2:
                break
        again = make()
        again.load_state_dict(loader.state_dict())
        assert ids(again) == first[2:]
        assert ids(again) == second

    run_fake_ranks(2, run)


def test_an_error_while_rank_0_reads_reaches_all_ranks() -> None:
    class Broken(Numbers):
        def __getitem__(self, index: int) -> int:
            if index == 6:
                raise KeyError("no sample 6")
            return index

    def run(group: FakeGroup) -> list[str]:
        loader = prepared(DataLoader(Broken(20), 2), group, dispatch_batches=True)
        try:
            ids(loader)
        except (KeyError, DataError) as error:
            return [type(error).__name__, str(error)]
        return []

    first, second = run_fake_ranks(2, run)
    assert first[0] == "KeyError"
    assert second[0] == "DataError"
    assert "Reading failed on rank 0: KeyError: 'no sample 6'" in second[1]


def test_ranks_agree_on_samplers_that_rank_0_runs() -> None:
    class OnlyOnRankZero(torch.utils.data.Sampler[int]):
        def __init__(self, rank: int) -> None:
            self.rank = rank

        def __len__(self) -> int:
            return 10

        def __iter__(self) -> Iterator[int]:
            assert self.rank == 0
            return iter(range(9, -1, -1))

    def run(group: FakeGroup) -> list[list[int]]:
        return ids(prepared(DataLoader(Numbers(10), 2, sampler=OnlyOnRankZero(group.rank)), group))

    assert run_fake_ranks(2, run) == [[[9, 8], [5, 4], [1, 0]], [[7, 6], [3, 2], [9, 8]]]


def test_a_sampler_that_fails_fails_on_all_ranks() -> None:
    class Failing(torch.utils.data.Sampler[int]):
        def __len__(self) -> int:
            return 10

        def __iter__(self) -> Iterator[int]:
            raise KeyError("weights")

    def run(group: FakeGroup) -> str:
        try:
            ids(prepared(DataLoader(Numbers(10), 2, sampler=Failing()), group))
        except (KeyError, DataError) as error:
            return type(error).__name__
        return "nothing"

    assert run_fake_ranks(2, run) == ["KeyError", "DataError"]


@pytest.mark.parametrize("batches", [True, False])
def test_a_sampler_with_a_length_and_no_end_is_refused(batches: bool) -> None:
    # One without a length is read batch by batch, and may have no end.
    class Endless(torch.utils.data.Sampler[Any]):
        def __len__(self) -> int:
            return 10

        def __iter__(self) -> Iterator[Any]:
            return itertools.cycle([list(range(10))] if batches else range(10))

    which: dict[str, Any] = {"batch_sampler": Endless()} if batches else {"batch_size": 2, "sampler": Endless()}

    def run(group: FakeGroup) -> str:
        with pytest.raises(DataError) as caught:
            ids(prepared(DataLoader(Numbers(10), **which), group))
        return str(caught.value)

    assert all("does not end" in said for said in run_fake_ranks(2, run))


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("even", [True, False])
def test_batches_of_different_sizes(sized: bool, even: bool) -> None:
    class Buckets(torch.utils.data.Sampler[list[int]]):
        def __iter__(self) -> Iterator[list[int]]:
            return iter([[0], [1, 2, 3], [4, 5], [6, 7], [8, 9, 10]])

    class Sized(Buckets):
        def __len__(self) -> int:
            return 5

    def run(group: FakeGroup) -> Any:
        sampler = Sized() if sized else Buckets()
        loader = DataLoader(Numbers(11), batch_sampler=sampler)
        return walk(prepared(loader, group, even_batches=even), group, gathered=even)

    first, second = run_fake_ranks(2, run)
    assert first[0] == [[0], [4, 5], [8, 9, 10]]
    assert second[0] == [[1, 2, 3], [6, 7], *([[0]] if even else [])]
    if even:
        assert sorted(first[2]) == sorted(second[2]) == list(range(11))


def test_batches_that_are_split_must_be_divisible() -> None:
    class Odd(torch.utils.data.Sampler[list[int]]):
        def __len__(self) -> int:
            return 2

        def __iter__(self) -> Iterator[list[int]]:
            return iter([[0, 1, 2], [3, 4]])

    def run(group: FakeGroup) -> str:
        loader = prepared(DataLoader(Numbers(5), batch_sampler=Odd()), group, split_batches=True)
        with pytest.raises(DataError) as caught:
            ids(loader)
        return str(caught.value)

    assert all("cannot be split evenly over 2 ranks" in text for text in run_fake_ranks(2, run))


class Unsized(BatchSampler):
    __len__ = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("loader", "hint"),
    [
        (DataLoader(PlainStream(8), 2, num_workers=2), "Set num_workers to 0 or 1"),
        (DataLoader(Numbers(8), batch_sampler=Unsized(range(8), 2, False)), "Give it a __len__"),
    ],
    ids=["workers", "unsized"],
)
def test_what_one_process_cannot_get_for_several_is_refused(loader: DataLoader[int], hint: str) -> None:
    with pytest.raises(DataError, match=hint):
        prepare_loader(
            loader,
            group=SoloGroup(),
            device=None,
            config=DataLoaderConfiguration(),
            active=ActiveLoaders(),
            num_merged_ranks=2,
        )


class BufferShuffledBatches:
    """The same as an iterable of batches."""

    def __init__(self, size: int, draw: Callable[[int], int]) -> None:
        self.stream = BufferShuffledStream(size, draw)

    def __iter__(self) -> Iterator[torch.Tensor]:
        items = iter(self.stream)
        while batch := list(itertools.islice(items, 2)):
            yield torch.tensor(batch)


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("by_batches", [False, True])
def test_a_stream_that_shuffles_with_global_generators_is_resumed_exactly(
    draw: Callable[[int], int], by_batches: bool
) -> None:
    def make() -> Any:
        return prepared(
            BufferShuffledBatches(20, draw) if by_batches else DataLoader(BufferShuffledStream(20, draw), 2)
        )

    def walk_from(loader: Any, batches: int) -> tuple[list[list[int]], list[float], Any]:
        """Run some batches of an epoch in a loop that draws, too; return them, what it drew, and the position."""
        found, drawn, state = [], [], None
        for number, batch in enumerate(loader, 1):
            found.append(batch.tolist())
            drawn += [random.random(), float(torch.rand(())), float(np.random.randn())]
            if number == batches:
                state = loader.state_dict(), random.getstate(), torch.get_rng_state(), np.random.get_state()
                break
        return found, drawn, state

    def seed() -> None:
        random.seed(1)
        torch.manual_seed(1)
        np.random.seed(1)

    seed()
    whole, drawn, _ = walk_from(make(), 0)
    assert sorted(itertools.chain(*whole)) == list(range(20))
    for stopped in range(1, len(whole)):
        seed()
        found, drawn_before, state = walk_from(make(), stopped)
        resumed = make()
        random.random()
        resumed.load_state_dict(state[0])
        random.setstate(state[1])
        torch.set_rng_state(state[2])
        np.random.set_state(state[3])
        rest, drawn_after, _ = walk_from(resumed, 0)
        assert found + rest == whole
        assert drawn_before + drawn_after == drawn


def test_an_isolated_random_state_leaves_the_global_one_as_it_was() -> None:
    def draw() -> list[float]:
        return [random.random(), float(torch.rand(())), float(np.random.rand()), float(np.random.randn())]

    random.seed(1)
    torch.manual_seed(1)
    np.random.seed(1)
    expected = [draw() for _ in range(6)]
    isolated = IsolatedRng(3)
    with isolated():
        continuous = [draw() for _ in range(5)]
    random.seed(1)
    torch.manual_seed(1)
    np.random.seed(1)
    interrupted, found = IsolatedRng(3), []
    for number in range(6):
        found.append(draw())
        if number < 5:
            with interrupted():
                assert draw() == continuous[number]
    assert found == expected


def test_what_seeds_itself_goes_on_from_its_seed() -> None:
    class Seeded(BufferShuffledStream):
        def __iter__(self) -> Iterator[int]:
            random.seed(5)
            return super().__iter__()

    random.seed(3)
    plain = [batch.tolist() for batch in DataLoader(Seeded(20, random.randrange), 2)]
    assert ids(prepared(DataLoader(Seeded(20, random.randrange), 2))) == plain
