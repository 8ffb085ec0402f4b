from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, Sampler, SubsetRandomSampler

from paceline import skip_first_batches
from paceline.collectives import FakeGroup, TorchGroup, gather_samples, run_fake_ranks
from paceline.errors import DataError
from tests.support.ranks import run_on_ranks
from tests.unit.data.support import Numbers, PlainStream, ids, prepared

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


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


class Lasting(Sampler[int]):
    """Seven samples, and whatever length it says."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(range(7))


class Unsized(Lasting):
    """The same without a length."""

    __len__ = None  # type: ignore[assignment]


LOADERS: dict[str, Callable[[], DataLoader[int]]] = {
    "stream": lambda: DataLoader(PlainStream(7), 2),
    "no length": lambda: DataLoader(Numbers(7), 2, sampler=Unsized(7)),
    "too short": lambda: DataLoader(Numbers(7), 2, sampler=Lasting(3)),
    "too long": lambda: DataLoader(Numbers(7), 2, sampler=Lasting(19)),
    "batches": lambda: DataLoader(Numbers(7), batch_sampler=BatchSampler(Lasting(3), 2, False)),
}


@pytest.mark.parametrize("config", [{}, {"dispatch_batches": True}])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", LOADERS)
def test_what_is_left_does_not_depend_on_a_length(kind: str, ranks: int, config: dict[str, Any]) -> None:
    def run(group: FakeGroup) -> list[Any]:
        whole = ids(prepared(LOADERS[kind](), group, **config))
        rests = []
        for number in range(len(whole) + 3):
            skipped = skip_first_batches(prepared(LOADERS[kind](), group, **config), number)
            rests.append((ids(skipped) == whole[number:], ids(skipped) == whole))
        return rests

    for rests in run_fake_ranks(ranks, run):
        assert rests == [(True, True)] * len(rests)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_rank_of_which_nothing_is_left_takes_part(number: int) -> None:
    def run(group: FakeGroup) -> list[list[int]]:
        sampler = SubsetRandomSampler(range(5), generator=torch.Generator().manual_seed(3))
        loader = prepared(DataLoader(Numbers(5), 1, sampler=sampler), group, even_batches=False)
        skipped = skip_first_batches(loader, number)
        return [*ids(skipped), *ids(loader)]

    found = run_fake_ranks(2, run)
    assert [len(batches) for batches in found] == [3 - min(3, number) + 3, max(0, 2 - number) + 2]


class Counting:
    """A batch sampler whose order depends on how often it has run, and on a generator of its own."""

    def __init__(self) -> None:
        self.runs = 0
        self.random = random.Random(5)

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[list[int]]:
        self.runs += 1
        order = self.random.sample(range(20), 20)
        sizes = [1 + (number + self.runs) % 4 for number in range(8)]
        ends = [sum(sizes[:number]) for number in range(9)]
        return iter([order[start:end] for start, end in itertools.pairwise(ends)])


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("config", [{}, {"dispatch_batches": True}])
def test_skipping_does_not_disturb_what_orders_the_samples(config: dict[str, Any], ranks: int) -> None:
    def run(group: FakeGroup) -> Any:
        batch_sampler: Any = Counting()
        loader = prepared(DataLoader(Numbers(20), batch_sampler=Counting()), group, **config)
        whole = [ids(loader), ids(loader)]
        other = prepared(DataLoader(Numbers(20), batch_sampler=batch_sampler), group, **config)
        skipped = skip_first_batches(other, 2)
        return whole, [whole[0][:2] + ids(skipped), ids(other)], batch_sampler.runs

    for rank, (whole, found, runs) in enumerate(run_fake_ranks(ranks, run)):
        assert found == whole
        assert whole[0] != whole[1]
        assert runs == (0 if rank else 2)


def test_a_sampler_that_counts_its_runs_is_not_run_to_skip() -> None:
    class Rotating(Lasting):
        runs = 0

        def __iter__(self) -> Iterator[int]:
            self.runs += 1
            return iter([(number + self.runs) % 7 for number in range(7)])

    def make() -> DataLoader[int]:
        return DataLoader(Numbers(7), 2, sampler=Rotating(7))

    assert ids(skip_first_batches(prepared(make()), 2)) == ids(prepared(make()))[2:]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_epoch_of_a_distributed_sampler_holds_while_skipping(ranks: int) -> None:
    def run(group: FakeGroup) -> Any:
        found = []
        for number in (0, 2):
            sampler: DistributedSampler[int] = DistributedSampler(Numbers(12), ranks, group.rank)
            loader = prepared(DataLoader(Numbers(12), 2, sampler=sampler), group)
            sampler.set_epoch(3)
            found.append(ids(skip_first_batches(loader, number)))
        return found

    for whole, rest in run_fake_ranks(ranks, run):
        assert rest == whole[2:]


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
