"""Accelerate's loaders under the switch: the same samples, order and random numbers as the real package gives."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import pickle
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler

from paceline.compat.accelerate import data_loader as twin
from paceline.compat.accelerate.state import GradientState
from tests.compat.loader_cases import (
    REAL,
    RECORDED,
    RECORDED_SEEDS,
    TWIN,
    Noisy,
    NoisyStream,
    SizedStream,
    few_dispatched,
    observations,
    stand_ready,
)
from tests.support.ranks import run_on_ranks

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.compat
needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed"
)
# Raised by torchdata 0.11 under torch 2.13, and by torch where loaders have workers on a busy machine.
pytestmark_warnings = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def _ready(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    stand_ready(TWIN)
    yield
    GradientState._reset_state()


# --- against the real package -----------------------------------------------------------------------------------------


def _compare(found: list[list[Any]], expected: list[list[Any]]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == theirs, ours[0]


def _recorded(rank: int, ranks: int) -> list[list[Any]]:
    return list(json.loads((RECORDED / f"loaders_rank{rank}_of_{ranks}.json").read_text()))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_recorded_numbers_on_one_process() -> None:
    _compare(observations(TWIN, RECORDED_SEEDS), _recorded(0, 1))


def test_recorded_numbers_on_two_ranks() -> None:
    for rank, found in enumerate(run_on_ranks(2, observations, TWIN, RECORDED_SEEDS)):
        _compare(found, _recorded(rank, 2))


@needs_accelerate
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("seeds", [range(100, 160), pytest.param(range(1000, 1600), marks=pytest.mark.slow)])
def test_same_as_accelerate_on_one_process(seeds: range) -> None:
    _compare(observations(TWIN, seeds), observations(REAL, seeds))


@needs_accelerate
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("seeds", [range(200, 240), pytest.param(range(2000, 2300), marks=pytest.mark.slow)])
def test_same_as_accelerate_on_ranks(ranks: int, seeds: range) -> None:
    ours = run_on_ranks(ranks, observations, TWIN, seeds)
    theirs = run_on_ranks(ranks, observations, REAL, seeds)
    for found, expected in zip(ours, theirs, strict=True):
        _compare(found, expected)


# By size, number of ranks and drop_last: what Accelerate gives each rank of few samples that rank 0 dispatches, and
# what the stand-in gives. Accelerate appends its first samples once, however many ranks lack one, and fails where rank
# 0 finds no whole batch of all ranks; the sweeps have no such cases.
FEW_DISPATCHED: dict[tuple[int, int, bool], tuple[Any, Any]] = {
    (1, 3, False): ([[[0]], [[0]], [[]]], [[[0]], [[0]], [[0]]]),
    (2, 3, False): ([[[0]], [[1]], [[0]]], [[[0]], [[1]], [[0]]]),
    (5, 3, False): ([[[0, 1]], [[2, 3]], [[4, 0]]], [[[0, 1]], [[2, 3]], [[4, 0]]]),
    (1, 2, True): (["TypeError"] * 2, [[], []]),
    (3, 2, True): (["TypeError"] * 2, [[], []]),
    (1, 1, True): (["TypeError"], [[]]),
}


@needs_accelerate
@pytest.mark.parametrize(("size", "ranks", "drop_last"), FEW_DISPATCHED)
def test_few_dispatched_samples_are_given_to_all_ranks(size: int, ranks: int, drop_last: bool) -> None:
    theirs, ours = (run_on_ranks(ranks, few_dispatched, package, size, drop_last) for package in (REAL, TWIN))
    assert (theirs, ours) == FEW_DISPATCHED[size, ranks, drop_last]


class _Batches(Sampler[list[int]]):
    """A batch sampler without a batch size."""

    def __init__(self, batches: list[list[int]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter([list(batch) for batch in self.batches])

    def __len__(self) -> int:
        return len(self.batches)


@needs_accelerate
def test_every_small_batch_sampler_is_divided_as_by_accelerate() -> None:
    import accelerate.data_loader as real

    choices = itertools.product(range(14), (1, 2, 4), (False, True), (1, 2, 3), (False, True), (False, True))
    for length, size, drop_last, ranks, split, even in choices:
        if split and size % ranks:
            continue
        for rank in range(ranks):
            ours = twin.BatchSamplerShard(BatchSampler(range(length), size, drop_last), ranks, rank, split, even)
            theirs = real.BatchSamplerShard(BatchSampler(range(length), size, drop_last), ranks, rank, split, even)
            assert (len(ours), list(ours)) == (len(theirs), list(theirs)), (length, size, drop_last, ranks, split, even)


@needs_accelerate
def test_batches_of_any_size_are_divided_as_by_accelerate() -> None:
    import accelerate.data_loader as real

    for seed in range(200):
        draw = random.Random(seed)
        batches = [[draw.randrange(99) for _ in range(draw.randint(1, 4))] for _ in range(draw.randint(0, 9))]
        ranks, even = draw.randint(1, 4), draw.random() < 0.5
        for rank in range(ranks):
            ours: Any = twin.BatchSamplerShard(_Batches(batches), ranks, rank, False, even)  # type: ignore[arg-type]
            theirs: Any = real.BatchSamplerShard(_Batches(batches), ranks, rank, False, even)
            assert (len(ours), list(ours)) == (len(theirs), list(theirs)), (batches, ranks, even)


@needs_accelerate
def test_every_small_stream_is_divided_as_by_accelerate() -> None:
    import accelerate.data_loader as real

    choices = itertools.product(range(14), (1, 2, 4), (False, True), (1, 2, 3), (False, True))
    for length, size, drop_last, ranks, split in choices:
        if split and size % ranks:
            continue
        for rank in range(ranks):
            shards = [p.IterableDatasetShard(_Count(length), size, drop_last, ranks, rank, split) for p in (twin, real)]
            ours, theirs = ((len(shard), list(shard)) for shard in shards)
            assert ours == theirs, (length, size, drop_last, ranks, split)


class _Count(IterableDataset[int]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.length))

    def __len__(self) -> int:
        return self.length


# --- without the real package -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [[[0, 1], [4, 5], [8, 0]], [[2, 3], [6, 7], [1, 2]]]),
        ({"split_batches": True}, [[[0], [2], [4], [6], [8]], [[1], [3], [5], [7], [0]]]),
        ({"even_batches": False}, [[[0, 1], [4, 5], [8]], [[2, 3], [6, 7]]]),
    ],
)
def test_nine_samples_in_batches_of_two_on_two_ranks(
    settings: dict[str, bool], expected: list[list[list[int]]]
) -> None:
    found = [list(twin.BatchSamplerShard(BatchSampler(range(9), 2, False), 2, rank, **settings)) for rank in range(2)]
    assert found == expected


def test_fewer_samples_than_a_global_batch_are_repeated() -> None:
    shards = [twin.BatchSamplerShard(BatchSampler(range(3), 4, False), 2, rank) for rank in range(2)]
    assert [list(shard) for shard in shards] == [[[0, 1, 2, 0]], [[1, 2, 0, 1]]]


def test_a_short_batch_in_the_middle_loses_no_samples() -> None:
    class Uneven(_Batches):
        batch_size = 2

    batches = [[0, 1], [2], [3, 4], [5, 6], [7]]
    shards: list[Any] = [twin.BatchSamplerShard(Uneven(batches), 2, rank) for rank in range(2)]  # type: ignore[arg-type]
    assert [list(shard) for shard in shards] == [[[0, 1], [3, 4], [7, 0]], [[2], [5, 6], [1, 2]]]


def test_assigning_the_rank_of_a_shard_holds_for_the_next_pass() -> None:
    shard = twin.BatchSamplerShard(BatchSampler(range(8), 2, False), 2, 1)
    shard.num_processes, shard.process_index = 1, 0
    assert list(shard) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert len(shard) == 4


@pytest.mark.parametrize("size", [3, None])
def test_batches_that_ranks_cannot_share_are_refused(size: int | None) -> None:
    sampler: Any = _Batches([[0]]) if size is None else BatchSampler(range(9), size, False)
    with pytest.raises(ValueError, match="multiple of 2"):
        twin.BatchSamplerShard(sampler, 2, 0, split_batches=True)
    with pytest.raises(ValueError, match="split_batches=True"):
        twin.prepare_data_loader(DataLoader(Noisy(9), batch_sampler=sampler), num_processes=2, split_batches=True)


def test_dispatching_needs_a_device() -> None:
    with pytest.raises(ValueError, match="put_on_device"):
        twin.prepare_data_loader(DataLoader(Noisy(9)), dispatch_batches=True)


def test_it_passes_for_a_loader_of_torch() -> None:
    loader: Any = twin.prepare_data_loader(DataLoader(Noisy(9), batch_size=2))
    assert isinstance(loader, DataLoader)
    assert isinstance(loader, twin.DataLoaderShard)
    assert isinstance(loader, twin.DataLoaderStateMixin)
    batch_sampler: Any = loader.batch_sampler
    assert batch_sampler.batch_size == 2
    assert not hasattr(loader, "nonsense")


@pytest.mark.filterwarnings("ignore:'set_vital':UserWarning")
def test_it_passes_for_a_stateful_loader() -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    loader = twin.prepare_data_loader(DataLoader(Noisy(9), batch_size=2), use_stateful_dataloader=True)
    assert isinstance(loader, stateful.StatefulDataLoader)
    batches = iter(loader)
    next(batches)
    next(batches)
    state = loader.state_dict()
    again = twin.prepare_data_loader(DataLoader(Noisy(9), batch_size=2), use_stateful_dataloader=True)
    again.load_state_dict(state)
    assert [batch["index"].tolist() for batch in again] == [[4, 5], [6, 7], [8]]


def test_a_loader_without_state_says_so() -> None:
    loader = twin.prepare_data_loader(DataLoader(Noisy(9)))
    with pytest.raises(AttributeError, match="use_stateful_dataloader=True"):
        loader.state_dict()


@pytest.mark.parametrize(
    "make",
    [
        lambda: twin.DataLoaderShard(Noisy(5), batch_size=2),
        lambda: twin.DataLoaderDispatcher(Noisy(5), batch_size=2),
        lambda: twin.SkipDataLoader(Noisy(5), batch_size=2),
    ],
)
def test_pickling(make: Any) -> None:
    loader = make()
    copy = pickle.loads(pickle.dumps(loader))
    assert type(copy) is type(loader)
    assert [b["index"].tolist() for b in copy] == [b["index"].tolist() for b in loader]


def test_the_last_batch_is_known_while_it_is_in_use() -> None:
    state = GradientState()
    loader = twin.prepare_data_loader(DataLoader(Noisy(5), batch_size=2))
    seen = [(state.active_dataloader is loader, state.end_of_dataloader, state.remainder) for _ in loader]
    assert seen == [(True, False, 1), (True, False, 1), (True, True, 1)]
    assert state.active_dataloader is None


def test_an_inner_loader_hands_over_to_the_outer_one() -> None:
    state = GradientState()
    outer, inner = (twin.prepare_data_loader(DataLoader(Noisy(4), batch_size=2)) for _ in range(2))
    for _ in outer:
        for _ in inner:
            assert state.active_dataloader is inner
        assert state.active_dataloader is outer


def test_skipping_keeps_what_the_loader_is() -> None:
    state = GradientState()
    loader = twin.prepare_data_loader(
        DataLoader(Noisy(9), batch_size=2, num_workers=0), num_processes=2, process_index=0, put_on_device=True,
        device=torch.device("cpu"), non_blocking=True,
    )  # fmt: skip
    skipping = twin.skip_first_batches(loader, 1)
    assert type(skipping) is twin.DataLoaderShard
    assert skipping._non_blocking
    assert (len(loader), len(skipping)) == (3, 2)
    # One of the last four samples is no filler.
    assert [(b["index"].tolist(), state.remainder) for b in skipping] == [([4, 5], 1), ([8, 0], 1)]
    assert [b["index"].tolist() for b in twin.skip_first_batches(skipping, 1)] == [[8, 0]]


def test_dropped_samples_leave_no_remainder_after_a_skip() -> None:
    state = GradientState()
    loader = twin.prepare_data_loader(DataLoader(Noisy(9), batch_size=2, drop_last=True))
    assert [state.remainder for _ in twin.skip_first_batches(loader, 1)] == [-1, -1, -1]


def test_skipping_in_a_stream() -> None:
    loader = twin.prepare_data_loader(DataLoader(SizedStream(9, generator=False), batch_size=2))
    skipping = twin.skip_first_batches(twin.skip_first_batches(loader, 1), 1)
    assert len(skipping) == 3
    assert [b["index"].tolist() for b in skipping] == [[4, 5], [6, 7], [8]]


def test_skipping_in_a_loader_that_was_not_prepared() -> None:
    plain = twin.skip_first_batches(DataLoader(Noisy(5), batch_size=2), 1)
    assert [b["index"].tolist() for b in plain] == [[2, 3], [4]]
    stream = twin.skip_first_batches(DataLoader(NoisyStream(5, generator=False), batch_size=2), 1)
    assert [b["index"].tolist() for b in stream] == [[2, 3], [4]]


def test_the_epoch_reaches_a_sampler_through_every_wrapper() -> None:
    loader = twin.prepare_data_loader(
        DataLoader(Noisy(9), batch_size=2, shuffle=True), num_processes=2, process_index=0, use_seedable_sampler=True
    )
    skipping = twin.skip_first_batches(loader, 1)
    skipping.set_epoch(7)
    sampler = skipping.get_sampler()
    assert isinstance(sampler, twin.SeedableRandomSampler)
    assert sampler.epoch == 7


def test_loaders_without_automatic_batching() -> None:
    class Rows:
        def __len__(self) -> int:
            return 6

        def __getitem__(self, rows: Any) -> Any:
            return torch.arange(6)[rows]

    # The sampler yields whole batches.
    by_batch: Any = DataLoader(Rows(), sampler=BatchSampler(range(6), 2, False), batch_size=None)  # type: ignore[arg-type]
    loader = twin.prepare_data_loader(by_batch, num_processes=2, process_index=1)
    assert [batch.tolist() for batch in loader] == [[2, 3], [0, 1]]
    # The sampler yields single indices.
    by_row: Any = DataLoader(Rows(), sampler=RandomSampler(Rows()), batch_size=None)  # type: ignore[arg-type]
    shards = [
        twin.prepare_data_loader(by_row, num_processes=2, process_index=rank, use_seedable_sampler=True, data_seed=0)
        for rank in range(2)
    ]
    assert sorted(int(row) for shard in shards for row in shard) == list(range(6))


def _dispatch(problem: str) -> str:
    stand_ready(TWIN)
    rows: Any = {"reading": _Broken(), "sizes": _Uneven()}[problem]
    loader = twin.prepare_data_loader(
        DataLoader(rows, batch_size=None), torch.device("cpu"), put_on_device=True, dispatch_batches=True
    )
    try:
        list(loader)
    except RuntimeError as error:
        GradientState._reset_state()
        return str(error)
    return "nothing was raised"


class _Broken(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield torch.zeros(2)
        raise RuntimeError("the file ends here")


class _Uneven(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield torch.zeros(2, 3)
        yield torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("problem", "message"), [("reading", "the file ends here"), ("sizes", "Pad them in the collate")]
)
def test_what_rank_0_cannot_read_is_an_error_on_all_ranks(problem: str, message: str) -> None:
    for found in run_on_ranks(2, _dispatch, problem):
        assert message in found


def _skip_dispatched() -> list[Any]:
    stand_ready(TWIN)
    loader = twin.prepare_data_loader(
        DataLoader(Noisy(10), batch_size=2), torch.device("cpu"), put_on_device=True, dispatch_batches=True
    )
    skipping = twin.skip_first_batches(loader, 1)
    return [len(skipping), *(batch["index"].tolist() for batch in skipping)]


def test_skipping_in_a_dispatcher_counts_batches_of_all_ranks() -> None:
    assert run_on_ranks(2, _skip_dispatched) == [[2, [4, 5], [8]], [2, [6, 7], [9]]]
