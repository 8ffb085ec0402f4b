from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from paceline import skip_first_batches
from paceline.collectives import TorchGroup, gather_samples
from paceline.errors import DataError
from tests.support.ranks import run_on_ranks
from tests.unit.data.support import Numbers, PlainStream, ids, prepared


def shuffled(**settings: Any) -> DataLoader[int]:
    return DataLoader(Numbers(20), 3, shuffle=True, **settings)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_pass_begins_later_and_further_ones_are_whole(workers: int) -> None:
    whole, loader = prepared(shuffled()), prepared(shuffled(num_workers=workers))
    skipped = skip_first_batches(loader, 4)
    assert isinstance(skipped, DataLoader)
    assert len(skipped) == 3
    assert ids(skipped) == ids(whole)[4:]
    assert len(skipped) == 7
    assert ids(skipped) == ids(whole)
    assert ids(loader) == ids(whole)
    assert skip_first_batches(loader, 0) is loader


@pytest.mark.parametrize("number", [7, 99])
def test_a_pass_of_which_nothing_is_left_is_empty(number: int) -> None:
    whole, loader = prepared(shuffled()), prepared(shuffled())
    ids(whole)
    assert ids(skip_first_batches(loader, number)) == []
    assert ids(loader) == ids(whole)


def test_anything_that_yields_batches_can_be_skipped_in() -> None:
    lists: Any = [[1], [2], [3]]
    assert list(skip_first_batches(lists, 2)) == [[3]]


def test_nothing_that_is_skipped_is_read() -> None:
    data = Numbers(1000)
    ids(skip_first_batches(prepared(DataLoader(data, 10)), 95))
    assert data.reads == 50
    plain = DataLoader(data, 10)
    assert ids(skip_first_batches(plain, 95)) == ids(prepared(plain))[95:]
    assert data.reads == 50 + 50 + 1000


def test_after_a_resume_it_changes_nothing() -> None:
    loader, again = prepared(shuffled()), prepared(shuffled())
    for number, _ in enumerate(loader, 1):
        if number == 4:
            break
    again.load_state_dict(loader.state_dict())
    skipped = skip_first_batches(again, 4)
    assert ids(skipped) == ids(prepared(shuffled()))[4:]
    assert again.epoch == 1


def test_the_position_is_that_of_the_loader() -> None:
    loader = prepared(shuffled())
    for _ in skip_first_batches(loader, 2):
        assert loader.state_dict()["samples"] == 9
        assert loader.remaining == 4
        break


def test_streams_are_read_and_dropped() -> None:
    assert ids(skip_first_batches(prepared(DataLoader(PlainStream(10), 3)), 2)) == [[6, 7, 8], [9]]
    assert ids(skip_first_batches(DataLoader(PlainStream(10), 3), 2)) == [[6, 7, 8], [9]]


def test_what_cannot_be_skipped_is_refused() -> None:
    with pytest.raises(DataError, match="skip -1 batches"):
        skip_first_batches(shuffled(), -1)
    with pytest.raises(DataError, match="passed to prepare"):
        prepared(skip_first_batches(shuffled(), 1))


def skip_and_gather(config: dict[str, Any]) -> list[int]:
    group = TorchGroup()
    loader = prepared(DataLoader(Numbers(9), 2), group, **config)
    found: list[torch.Tensor] = []
    for batch in skip_first_batches(loader, 1):
        found.append(gather_samples(group, batch, loader.counts))
    return sorted(torch.cat(found).tolist())


@pytest.mark.parametrize("config", [{}, {"dispatch_batches": True}])
def test_metrics_count_each_sample_once(config: dict[str, Any]) -> None:
    assert run_on_ranks(2, skip_and_gather, config) == [[4, 5, 6, 7, 8]] * 2
