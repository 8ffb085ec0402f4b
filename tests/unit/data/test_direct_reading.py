"""A loader without workers reads what torch's own iterator reads, and shows the same in a profile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Subset, TensorDataset

from paceline.data.direct_reading import PROFILE_NAME, can_read_directly, read_directly
from paceline.data.epoch_plan import KEYS_AT_A_TIME, Layout, UniformBatchPlan
from paceline.data.sample_order import ListOrder, RangeOrder, TensorOrder
from tests.unit.data.support import Numbers, prepared

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SIZE = 10


class Stream(IterableDataset[int]):
    def __init__(self, size: int = SIZE) -> None:
        self.size = size
        self.taken = 0

    def __iter__(self) -> Iterator[int]:
        for number in range(self.size):
            self.taken += 1
            yield number


class Columns:
    """Reads a whole batch of keys at once, as a table does."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, key: int) -> int:
        raise AssertionError("one by one")

    def __getitems__(self, keys: list[int]) -> list[int]:
        return [key * 10 for key in keys]


def two_at_a_time() -> BatchSampler:
    return BatchSampler(RandomSampler(range(SIZE)), 4, drop_last=False)


LOADERS: dict[str, Callable[[torch.Generator], DataLoader[Any]]] = {
    "map": lambda g: DataLoader(Numbers(SIZE), 4, generator=g),
    "shuffled": lambda g: DataLoader(Numbers(SIZE), 4, shuffle=True, generator=g),
    "drop_last": lambda g: DataLoader(Numbers(SIZE), 4, drop_last=True, generator=g),
    "columns": lambda g: DataLoader(Columns(), 4, generator=g),  # type: ignore[arg-type]
    "subset": lambda g: DataLoader(Subset(Numbers(SIZE), [3, 1, 4, 1, 5]), 2, generator=g),
    "tensors": lambda g: DataLoader(TensorDataset(torch.arange(SIZE)), 3, shuffle=True, generator=g),
    "single": lambda g: DataLoader(Numbers(SIZE), batch_size=None, generator=g),
    "batches as keys": lambda g: DataLoader(
        TensorDataset(torch.arange(SIZE)), batch_size=None, sampler=two_at_a_time(), generator=g
    ),
    "list": lambda g: DataLoader(Numbers(SIZE), 4, collate_fn=list, generator=g),
    "stream": lambda g: DataLoader(Stream(), 4, generator=g),
    "stream, whole batches": lambda g: DataLoader(Stream(8), 4, generator=g),
    "stream, drop_last": lambda g: DataLoader(Stream(), 4, drop_last=True, generator=g),
    "stream, single": lambda g: DataLoader(Stream(), batch_size=None, generator=g),
    "empty stream": lambda g: DataLoader(Stream(0), 4, generator=g),
}


def as_text(batches: Any, generator: torch.Generator) -> tuple[list[str], int]:
    """The batches, and what the generator draws after them."""
    found = [str(batch) for batch in batches]
    return found, int(torch.randint(1 << 40, (), generator=generator))


@pytest.mark.parametrize("name", LOADERS)
def test_the_batches_and_random_draws_are_those_of_torch(name: str) -> None:
    ours, theirs = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    loader = LOADERS[name](ours)
    assert can_read_directly(loader)
    found = as_text(read_directly(loader), ours)
    torch.manual_seed(0)
    assert found == as_text(LOADERS[name](theirs), theirs)


def test_a_stream_is_not_asked_again_after_a_short_batch() -> None:
    stream = Stream()
    batches = read_directly(DataLoader(stream, 4))
    assert [len(next(batches)) for _ in range(3)] == [4, 4, 2]
    assert next(batches, None) is None
    assert stream.taken == SIZE


def test_workers_and_own_iterators_are_left_to_torch() -> None:
    class Own(DataLoader[Any]):
        def _get_iterator(self) -> Any:
            return iter(())

    assert not can_read_directly(DataLoader(Numbers(SIZE), 4, num_workers=1))
    assert not can_read_directly(DataLoader(Numbers(SIZE), 4, pin_memory=True))
    assert not can_read_directly(DataLoader(Numbers(SIZE), 4, timeout=1))
    assert not can_read_directly(Own(Numbers(SIZE), 4))


@pytest.mark.parametrize("data", [Numbers(SIZE), Stream()], ids=["map", "stream"])
def test_a_profile_shows_each_batch(data: Any) -> None:
    with torch.profiler.profile() as profile:
        list(prepared(DataLoader(data, 5)))
    (row,) = [event for event in profile.key_averages() if event.key == PROFILE_NAME]
    assert row.count >= 2


def test_a_data_set_that_raises_stop_iteration_does_not_end_the_epoch_in_silence() -> None:
    class Stops(Numbers):
        def __getitem__(self, index: int) -> int:
            if index == 6:
                raise StopIteration
            return index

    with pytest.raises(RuntimeError, match="StopIteration"):
        list(prepared(DataLoader(Stops(SIZE), 2)))


LAYOUTS = [(True, False, True), (True, False, False), (False, True, True)]


@pytest.mark.parametrize("size", [1, 7, 24, 25, 3 * KEYS_AT_A_TIME + 5])
@pytest.mark.parametrize("start", [0, 6, 24])
@pytest.mark.parametrize(("even", "drop_last", "fill"), LAYOUTS)
def test_batches_cut_many_at_a_time_are_those_cut_one_by_one(
    size: int, start: int, even: bool, drop_last: bool, fill: bool
) -> None:
    keys = torch.randperm(2 * size)[::2]
    layout = Layout(batch_size=3, num_ranks=2, even=even, drop_last=drop_last, fill=fill)
    for order in (RangeOrder(size), TensorOrder(keys), ListOrder([str(key) for key in keys.tolist()])):
        plan = UniformBatchPlan(order, layout, start)
        for rank in range(2):
            one_by_one = [plan.batch(index, rank) for index in range(plan.num_batches(rank))]
            assert list(plan.batches(rank)) == one_by_one
