"""The epoch that a data set is told, in this process and in workers that live on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import ChainDataset, ConcatDataset, DataLoader, Dataset, IterableDataset, StackDataset, Subset

from paceline.errors import DataError
from tests.unit.data.support import prepared

WORKERS = [(0, False), (1, False), (2, True)]


class OfEpoch(Dataset[Any]):
    """Every sample is the epoch; counts how often it was told."""

    def __init__(self) -> None:
        self.now, self.told = 0, 0

    def set_epoch(self, epoch: int) -> None:
        self.now, self.told = epoch, self.told + 1

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        return torch.tensor(self.now)


class StreamOfEpoch(IterableDataset[Any]):
    now = 0

    def set_epoch(self, epoch: int) -> None:
        self.now = epoch

    def __iter__(self) -> Any:
        return (torch.tensor(self.now) for _ in range(4))


class Outer(Dataset[Any]):
    """Wraps another and tells it twice the epoch: what is inside is its business."""

    def __init__(self) -> None:
        self.dataset = OfEpoch()

    def set_epoch(self, epoch: int) -> None:
        self.dataset.now = 2 * epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]


class Wrapped(Dataset[Any]):
    def __init__(self) -> None:
        self.dataset = OfEpoch()

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]


MADE: dict[str, Any] = {
    "map": OfEpoch,
    "stream": StreamOfEpoch,
    "subset": lambda: Subset(OfEpoch(), range(6)),
    "subset of concat": lambda: Subset(ConcatDataset([OfEpoch(), OfEpoch()]), range(2, 8)),
    "stack": lambda: StackDataset(OfEpoch(), OfEpoch()),
    "stack by name": lambda: StackDataset(a=OfEpoch(), b=OfEpoch()),
    "chain": lambda: ChainDataset([StreamOfEpoch(), StreamOfEpoch()]),
    "wrapped": Wrapped,
}


def epochs_in(batch: Any) -> set[int]:
    if isinstance(batch, dict):
        batch = list(batch.values())
    parts = batch if isinstance(batch, list) else [batch]
    return {int(value) for part in parts for value in part.reshape(-1)}


def seen(loader: Any, epochs: int = 3) -> list[list[int]]:
    return [sorted(set().union(*(epochs_in(batch) for batch in loader))) for _ in range(epochs)]


@pytest.mark.parametrize(("workers", "persistent"), WORKERS)
@pytest.mark.parametrize("kind", MADE)
def test_what_is_read_is_of_its_epoch(kind: str, workers: int, persistent: bool) -> None:
    settings: Any = {"num_workers": workers, "persistent_workers": persistent}
    loader = prepared(DataLoader(MADE[kind](), 2, **settings))
    assert seen(loader) == [[0], [1], [2]]
    loader.set_epoch(7)
    assert seen(loader, 1) == [[7]]
    state = loader.state_dict()
    again = prepared(DataLoader(MADE[kind](), 2, **settings))
    again.load_state_dict(state)
    assert seen(again, 1) == [[8]]


@pytest.mark.parametrize(("workers", "persistent"), WORKERS)
def test_an_outer_data_set_tells_its_inner_ones_itself(workers: int, persistent: bool) -> None:
    loader = prepared(DataLoader(Outer(), 2, num_workers=workers, persistent_workers=persistent))
    assert seen(loader) == [[0], [2], [4]]


class Counting(OfEpoch):
    def __getitem__(self, index: int) -> Any:
        return torch.tensor(self.told)


def test_a_worker_is_told_once_an_epoch() -> None:
    loader = prepared(DataLoader(Counting(), 1, num_workers=1, persistent_workers=True))
    # Once before the workers were started, and once in each of them for every epoch.
    assert [max(int(told) for told in loader) for _ in range(3)] == [2, 3, 4]


def test_workers_that_read_single_samples_are_started_anew(caplog: pytest.LogCaptureFixture) -> None:
    loader = prepared(DataLoader(OfEpoch(), None, num_workers=1, persistent_workers=True))
    assert seen(loader) == [[0], [1], [2]]
    assert "restarted in each epoch" in caplog.text


class ByAttribute(Dataset[Any]):
    epoch = 0

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return torch.tensor(self.epoch)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_attribute_that_persistent_workers_would_not_see_is_refused(workers: int) -> None:
    def by_hand(persistent: bool) -> list[list[int]]:
        data = ByAttribute()
        data.epoch = 0
        loader = prepared(DataLoader(data, 2, num_workers=workers, persistent_workers=persistent))
        found = []
        for epoch in range(2):
            data.epoch = epoch
            found += seen(loader, 1)
        return found

    assert by_hand(False) == [[0], [1]]
    if workers:
        with pytest.raises(DataError, match="has epoch=1, but its persistent workers have copies with epoch=0"):
            by_hand(True)


class OwnLoop(DataLoader[Any]):
    def __iter__(self) -> Any:
        yield from super().__iter__()


def test_workers_of_a_loader_with_its_own_iteration_cannot_be_told() -> None:
    with pytest.raises(DataError, match=r"do not learn which epoch it is\. Set persistent_workers=False"):
        prepared(OwnLoop(OfEpoch(), 2, num_workers=1, persistent_workers=True))
    assert seen(prepared(OwnLoop(OfEpoch(), 2, num_workers=1))) == [[0], [1], [2]]
