from __future__ import annotations

import itertools
from typing import Any

import pytest
from torch.utils.data import DataLoader

from paceline.data import PreparedDataLoader
from paceline.errors import DataError
from tests.unit.data.support import Numbers, Seat, ids, prepared


def every_rank(samples: int, batch: int, size: int, *, drop_last: bool = False, **config: Any) -> list[Any]:
    loaders = [
        prepared(DataLoader(Numbers(samples), batch, drop_last=drop_last), Seat(rank, size), **config)
        for rank in range(size)
    ]
    return [ids(loader) for loader in loaders]


def test_even_batches_are_completed_from_the_start() -> None:
    assert every_rank(9, 2, 2) == [[[0, 1], [4, 5], [8, 0]], [[2, 3], [6, 7], [1, 2]]]


def test_split_batches_divide_the_batch() -> None:
    assert every_rank(9, 4, 2, split_batches=True) == [[[0, 1], [4, 5], [8, 0]], [[2, 3], [6, 7], [1, 2]]]


def test_uneven_batches_end_where_the_data_ends() -> None:
    assert every_rank(9, 2, 2, even_batches=False) == [[[0, 1], [4, 5], [8]], [[2, 3], [6, 7]]]


def test_drop_last_leaves_out_the_incomplete_round_on_all_ranks() -> None:
    assert every_rank(9, 2, 2, drop_last=True) == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    assert every_rank(7, 2, 2, drop_last=True) == [[[0, 1]], [[2, 3]]]


def test_few_samples_are_cycled() -> None:
    assert every_rank(3, 4, 2) == [[[0, 1, 2, 0]], [[1, 2, 0, 1]]]


def test_one_rank_is_never_completed() -> None:
    assert every_rank(5, 2, 1) == [[[0, 1], [2, 3], [4]]]


def test_a_batch_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(DataError, match="A batch of 5 samples cannot be split evenly over 2 ranks"):
        every_rank(9, 5, 2, split_batches=True)


def walk(loader: PreparedDataLoader, rank: int, split_rows: int) -> tuple[list[int], list[Any]]:
    """Run an epoch, checking what the loader says about itself; return the real samples and the counts."""
    real: list[int] = []
    counts = []
    number = 0
    for number, batch in enumerate(loader, 1):
        assert len(batch) == loader.counts.rows[rank] > 0
        assert loader.remaining == len(loader) - number
        assert loader.end_of_dataloader == (number == len(loader))
        real += batch[: loader.counts.real[rank]].tolist()
        counts.append(loader.counts)
    assert number == len(loader)
    return real, counts


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_sample_once_in_every_layout(shuffle: bool) -> None:
    cases = itertools.product(
        [1, 2, 3, 5, 8, 9, 16, 23], [1, 2, 3, 4], [1, 2, 3, 4], [False, True], [False, True], [False, True]
    )
    tried = 0
    for samples, batch, size, drop_last, split, even in cases:
        total = batch * (1 if split else size)
        if (split and batch % size) or (drop_last and samples < total):
            continue
        tried += 1
        found: list[int] = []
        lengths = set()
        counts: list[Any] = []
        for rank in range(size):
            loader = prepared(
                DataLoader(Numbers(samples), batch, shuffle=shuffle, drop_last=drop_last),
                Seat(rank, size),
                split_batches=split,
                even_batches=even,
            )
            assert loader.total_batch_size == total
            assert loader.total_dataset_length == samples
            real, told = walk(loader, rank, total // size)
            found += real
            lengths.add(len(loader))
            counts = max(counts, told, key=len)
            if even and size > 1:
                assert all(c.rows == (total // size,) * size for c in told)
        used = samples // total * total if drop_last else samples
        assert sum(sum(c.real) for c in counts) == used
        assert len(found) == len(set(found)) == used
        if even or drop_last:
            assert len(lengths) == 1
    assert tried > 500


def test_short_batches_are_of_a_ranks_own_samples() -> None:
    """As many batches on every rank; none is filled up, and one that is given to a rank counts for nothing."""
    cases = itertools.product([1, 2, 3, 5, 9, 16, 23], [1, 2, 3, 4], [2, 3, 4], [False, True])
    for samples, batch, size, split in cases:
        if split and batch % size:
            continue
        found: list[int] = []
        lengths = set()
        for rank in range(size):
            loader = prepared(DataLoader(Numbers(samples), batch), Seat(rank, size), split_batches=split)
            loader.fill_batches = False
            real, told = walk(loader, rank, 0)
            found += real
            lengths.add(len(loader))
            assert all(count in (0, rows) for c in told for rows, count in zip(c.rows, c.real, strict=True))
        assert len(found) == len(set(found)) == samples
        assert len(lengths) == 1


def test_a_pass_goes_on_as_it_began() -> None:
    loader = prepared(DataLoader(Numbers(5), 2), Seat(0, 2))
    batches = iter(loader)
    next(batches)
    loader.fill_batches = False
    assert next(batches).tolist() == [4, 0]
    assert ids(loader) == [[0, 1], [4]]
    with loader.dealing(even=False, fill=True):
        assert ids(loader) == [[0, 1], [4]]
    assert (loader.even_batches, loader.fill_batches) == (True, False)


def test_the_number_of_ranks_does_not_change_the_order() -> None:
    def in_order(batch: int, size: int) -> list[list[int]]:
        loaders = [prepared(DataLoader(Numbers(96), batch, shuffle=True), Seat(rank, size)) for rank in range(size)]
        return [list(itertools.chain(*parts)) for parts in zip(*map(ids, loaders), strict=True)]

    alone = in_order(12, 1)
    assert sorted(itertools.chain(*alone)) == list(range(96)) != list(itertools.chain(*alone))
    assert in_order(6, 2) == in_order(4, 3) == in_order(2, 6) == alone


def test_no_rank_looks_at_another_ranks_batches() -> None:
    data = Numbers(64 * 512)
    loader = prepared(DataLoader(data, 4), Seat(300, 512))
    assert len(ids(loader)) == 16
    assert data.reads == 64


def test_a_loader_that_yields_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="Numbers with 0 samples makes no batch"):
        prepared(DataLoader(Numbers(0), 2))
    with pytest.raises(DataError, match="needs one whole global batch of 8"):
        prepared(DataLoader(Numbers(7), 4, drop_last=True), Seat(0, 2))


def test_one_line_tells_how_data_is_dealt_out() -> None:
    loader = prepared(DataLoader(Numbers(10_007), 32, shuffle=True), Seat(0, 2))
    assert loader.describe() == (
        "10,007 samples, shuffled by (seed 7, epoch), global batch of 64 samples = 2 ranks x 32 samples, "
        "157 batches per rank, the last filled up with 41 samples from the start of the epoch"
    )


def test_a_batch_larger_than_the_data_is_remarked_on(caplog: pytest.LogCaptureFixture) -> None:
    def warnings(samples: int, ranks: int) -> list[str]:
        caplog.clear()
        prepared(DataLoader(Numbers(samples), batch_size=4), group=Seat(0, ranks))
        return [record.getMessage() for record in caplog.records]

    assert warnings(8, 2) == []
    [warning] = warnings(7, 2)
    assert warning.startswith("A global batch of 8 samples (2 ranks x 4) is larger than the data set of 7")
    assert warnings(3, 1) == [], "one rank is never filled up"
