"""A `__len__` that is wrong is reported once, after the first whole epoch; a correct one never is."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from torch.utils.data import DataLoader, IterableDataset, Sampler

from paceline.collectives import FakeGroup, run_fake_ranks
from paceline.data import PreparedDataLoader, skip_first_batches
from tests.unit.data.support import Numbers, PlainStream, SplittingStream, ids, prepared


class FixedLength(Sampler[Any]):
    """Yields `items`, and has a length of its own choice."""

    def __init__(self, items: list[Any], length: int) -> None:
        self.items = items
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


class FixedLengthStream(IterableDataset[int]):
    """Yields `size` numbers, and has a length of its own choice."""

    def __init__(self, size: int, length: int) -> None:
        self.size = size
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.size))


class SizedStream(SplittingStream):
    """Splits itself over the readers, and knows its length."""

    def __len__(self) -> int:
        return self.size


def pairs(number: int) -> list[list[int]]:
    return [[2 * i, 2 * i + 1] for i in range(number)]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records if "first whole epoch" in record.getMessage()]
    caplog.clear()
    return found


@pytest.mark.parametrize(
    ("loader", "name", "expected", "actual"),
    [
        (DataLoader(Numbers(20), 1, sampler=FixedLength(list(range(7)), 20)), "DataLoader over Numbers", 20, 7),
        (DataLoader(Numbers(20), 2, sampler=FixedLength(list(range(7)), 3)), "DataLoader over Numbers", 2, 4),
        (DataLoader(Numbers(20), None, sampler=FixedLength(list(range(7)), 20)), "DataLoader over Numbers", 20, 7),
        (DataLoader(Numbers(20), batch_sampler=FixedLength(pairs(4), 10)), "DataLoader over Numbers", 10, 4),
        (DataLoader(FixedLengthStream(7, 20), 1), "DataLoader over FixedLengthStream", 20, 7),
        (DataLoader(FixedLengthStream(7, 20), 2, drop_last=True), "DataLoader over FixedLengthStream", 10, 3),
        (DataLoader(FixedLengthStream(20, 7), 2), "DataLoader over FixedLengthStream", 4, 10),
        (FixedLength([1, 2, 3], 5), "FixedLength over ", 5, 3),
    ],
)
def test_a_wrong_length_is_reported_once(
    loader: Any, name: str, expected: int, actual: int, caplog: pytest.LogCaptureFixture
) -> None:
    ready = prepared(loader)
    assert len(ready) == expected
    assert len(list(ready)) == actual
    [warning] = warnings(caplog)
    assert name in warning
    assert f"is {expected} batches, but its first whole epoch had {actual}" in warning
    assert "Schedules and max_steps that are computed from len(loader) are wrong" in warning
    assert len(list(ready)) == actual
    assert warnings(caplog) == []


@pytest.mark.parametrize("config", [{}, {"even_batches": False}, {"dispatch_batches": True}, {"split_batches": True}])
@pytest.mark.parametrize("kind", ["sampler", "batch sampler"])
def test_one_rank_reports_it_for_all(kind: str, config: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    def run(group: FakeGroup) -> tuple[int, int]:
        if kind == "sampler":
            loader = DataLoader(Numbers(20), 2, sampler=FixedLength(list(range(7)), 20))
        else:
            loader = DataLoader(Numbers(20), batch_sampler=FixedLength(pairs(5), 10))
        ready = prepared(loader, group, **config)
        return len(ready), len(ids(ready))

    length, actual = run_fake_ranks(2, run)[0]
    assert length > actual
    [warning] = warnings(caplog)
    assert f"is {length} batches, but its first whole epoch had {actual}" in warning


@pytest.mark.parametrize("config", [{}, {"even_batches": False}])
def test_a_stream_on_several_ranks(config: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    run_fake_ranks(2, lambda group: ids(prepared(DataLoader(FixedLengthStream(7, 20), 2), group, **config)))
    # Ranks that end by themselves do not know what the others have read.
    assert len(warnings(caplog)) == (0 if config else 1)


def honest_loaders() -> list[Any]:
    return [
        DataLoader(Numbers(7), 2),
        DataLoader(Numbers(7), 2, shuffle=True, drop_last=True),
        DataLoader(Numbers(7), 2, sampler=FixedLength(list(range(7)), 7)),
        DataLoader(Numbers(7), 2, sampler=FixedLength(list(range(7)), 7), drop_last=True),
        DataLoader(Numbers(11), batch_sampler=FixedLength([[0, 1], [2, 3], [4, 5, 6, 7], [8, 9, 10]], 4)),
        DataLoader(Numbers(11), batch_sampler=FixedLength([[0, 1], [2, 3], [4]], 3)),
        DataLoader(SizedStream(7), 2),
        DataLoader(SizedStream(7), 2, drop_last=True),
        DataLoader(FixedLengthStream(7, 7), 2),
        DataLoader(PlainStream(7), 2),
    ]


@pytest.mark.parametrize("config", [{}, {"even_batches": False}, {"dispatch_batches": True}])
@pytest.mark.parametrize("number", range(len(honest_loaders())))
def test_a_correct_length_is_not_reported(
    number: int, config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    run_fake_ranks(2, lambda group: ids(prepared(honest_loaders()[number], group, **config)))
    ids(prepared(honest_loaders()[number]))
    assert warnings(caplog) == []


@pytest.mark.parametrize("config", [{}, {"even_batches": False}, {"dispatch_batches": True}])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_length_of_a_stream_is_the_number_of_its_batches(
    ranks: int, drop_last: bool, config: dict[str, Any]
) -> None:
    def run(group: FakeGroup) -> list[tuple[int, int]]:
        lengths = []
        for size in range(12, 20):
            ready = prepared(DataLoader(SizedStream(size), 2, drop_last=drop_last), group, **config)
            assert ready.total_dataset_length == size
            lengths.append((len(ready), len(ids(ready))))
        return lengths

    for lengths in run_fake_ranks(ranks, run):
        assert [length for length, _ in lengths] == [number for _, number in lengths]


@pytest.mark.parametrize("drop_last", [False, True])
def test_short_dispatched_batches_of_each_worker_are_no_wrong_length(
    drop_last: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def run(group: FakeGroup) -> tuple[int, int]:
        loader = DataLoader(SizedStream(18), 2, num_workers=2, drop_last=drop_last)
        ready = prepared(loader, group, dispatch_batches=True)
        return len(ready), len(ids(ready))

    assert run_fake_ranks(2, run) == [(4, 4) if drop_last else (5, 5)] * 2
    assert warnings(caplog) == []


@pytest.mark.parametrize("drop_last", [False, True])
def test_short_batches_of_each_worker_are_no_wrong_length(drop_last: bool, caplog: pytest.LogCaptureFixture) -> None:
    ready = prepared(DataLoader(SizedStream(14), 4, num_workers=2, drop_last=drop_last))
    assert (len(ready), len(ids(ready))) == ((3, 2) if drop_last else (4, 4))
    ready = prepared(DataLoader(SizedStream(10), 4, num_workers=2, drop_last=drop_last))
    assert (len(ready), len(ids(ready))) == ((2, 2) if drop_last else (3, 4))
    assert warnings(caplog) == []


def test_only_a_whole_epoch_shows_it(caplog: pytest.LogCaptureFixture) -> None:
    def wrong() -> PreparedDataLoader:
        return prepared(DataLoader(Numbers(20), 1, sampler=FixedLength(list(range(7)), 20)))

    caplog.set_level(logging.WARNING)
    loader = wrong()
    for _ in loader:
        break
    state = loader.state_dict()
    ids(skip_first_batches(wrong(), 2))
    resumed = wrong()
    resumed.load_state_dict(state)
    assert len(ids(resumed)) == 6
    assert warnings(caplog) == []
    ids(resumed)
    assert len(warnings(caplog)) == 1
