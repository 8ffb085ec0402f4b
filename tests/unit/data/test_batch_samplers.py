"""Batch samplers of the script, with and without a length, among ranks."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.data import DataLoader

from paceline.collectives import FakeGroup, run_fake_ranks
from paceline.errors import DataError
from tests.unit.data.support import Numbers, ids, prepared

if TYPE_CHECKING:
    from collections.abc import Iterator


class Batches:
    """Yields these batches, and has no length."""

    def __init__(self, batches: list[list[int]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


class SizedBatches(Batches):
    """The same with a length."""

    def __len__(self) -> int:
        return len(self.batches)


def as_tensor(samples: list[int]) -> torch.Tensor:
    """Also makes a batch of no samples."""
    return torch.tensor(samples, dtype=torch.int64)


def loader_of(batches: Any) -> DataLoader[int]:
    return DataLoader(Numbers(20), batch_sampler=batches, collate_fn=as_tensor)


@pytest.mark.parametrize("config", [{}, {"dispatch_batches": True}, {"dispatch_batches": True, "split_batches": True}])
@pytest.mark.parametrize("batches", [[[], [0, 1]], [[0, 1], [], [2, 3]], [[0, 1], [2, 3], []]])
@pytest.mark.parametrize("kind", [Batches, SizedBatches])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_batch_without_samples_is_refused(
    ranks: int, kind: type[Batches], batches: list[list[int]], config: dict[str, Any]
) -> None:
    def run(group: FakeGroup) -> str:
        with pytest.raises(DataError) as caught:
            ids(prepared(loader_of(kind(batches)), group, **config))
        return str(caught.value)

    assert all(f"{kind.__name__} yielded a batch without samples" in said for said in run_fake_ranks(ranks, run))


@pytest.mark.parametrize("kind", [Batches, SizedBatches])
@pytest.mark.parametrize("batches", [[[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]], [[0], [1, 2, 3], [4, 5], [6], [7, 8]]])
@pytest.mark.parametrize("config", [{}, {"split_batches": True}])
def test_a_resumed_epoch_is_padded_as_a_whole_one(
    config: dict[str, Any], batches: list[list[int]], kind: type[Batches]
) -> None:
    if config:
        batches = [[0, 1], [2, 3], [4]]

    def run(group: FakeGroup) -> Any:
        loader = prepared(loader_of(kind(batches)), group, **config)
        iterator = iter(loader)
        first = [next(iterator).tolist()]
        state = loader.state_dict()
        again = prepared(loader_of(kind(batches)), group, **config)
        again.load_state_dict(state)
        return first + ids(again), first + [batch.tolist() for batch in iterator]

    for resumed, whole in run_fake_ranks(2, run):
        assert resumed == whole
        assert len(whole) == 3


@pytest.mark.parametrize("kind", [Batches, SizedBatches])
def test_a_rank_without_a_part_of_the_last_batch_knows_its_end(kind: type[Batches]) -> None:
    def run(group: FakeGroup) -> list[Any]:
        loader = prepared(loader_of(kind([[0, 1, 2], [3, 4, 5], [6]])), group, split_batches=True, even_batches=False)
        return [(batch.tolist(), loader.end_of_dataloader) for batch in loader]

    assert run_fake_ranks(3, run) == [
        [([0], False), ([3], False), ([6], True)],
        [([1], False), ([4], True)],
        [([2], False), ([5], True)],
    ]


@pytest.mark.parametrize("dispatch", [False, True])
@pytest.mark.parametrize("kind", [Batches, SizedBatches])
def test_only_the_last_batch_may_be_split_unevenly(kind: type[Batches], dispatch: bool) -> None:
    def run(group: FakeGroup, batches: list[list[int]]) -> list[list[int]]:
        return ids(prepared(loader_of(kind(batches)), group, split_batches=True, dispatch_batches=dispatch))

    first, second = run_fake_ranks(2, lambda group: run(group, [[0, 1, 2, 3], [4, 5, 6]]))
    assert first == [[0, 1], [4, 5]]
    # Rank 0 does not repeat samples of a batch sampler without a length that it reads for all.
    assert second == [[2, 3], [6] if dispatch and kind is Batches else [6, 0]]
    with pytest.raises(DataError, match="has 3 samples for 2 ranks"):
        run_fake_ranks(2, lambda group: run(group, [[0, 1], [2, 3, 4], [5, 6]]))


@pytest.mark.parametrize("left", [1, 2, 5])
@pytest.mark.parametrize("dispatch", [False, True])
def test_a_position_counted_in_other_batches_is_refused_also_near_the_end(dispatch: bool, left: int) -> None:
    batches = [[number] for number in range(2 + left)]
    states: dict[int, Any] = {}

    def save(group: FakeGroup) -> None:
        loader = prepared(loader_of(Batches(batches)), group, dispatch_batches=dispatch)
        iterator = iter(loader)
        next(iterator)
        states[group.rank] = loader.state_dict()
        list(iterator)

    def load(group: FakeGroup) -> list[list[int]]:
        loader = prepared(loader_of(Batches(batches)), group, dispatch_batches=dispatch)
        loader.load_state_dict(states[0])
        return ids(loader)

    run_fake_ranks(2, save)
    with pytest.raises(DataError, match="was saved with batches of varying size over 2 ranks"):
        run_fake_ranks(4, load)


class Shuffled:
    """Batches in an order of its own for each epoch."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.epoch = 0
        self.generator = torch.Generator().manual_seed(3)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        if self.source == "epoch":
            order = random.Random(self.epoch).sample(range(20), 20)
        else:
            order = torch.randperm(20, generator=self.generator).tolist()
        return iter([order[start : start + 2] for start in range(0, 20, 2)])


@pytest.mark.parametrize("source", ["epoch", "generator"])
def test_dispatching_changes_nothing_about_the_order_of_epochs(source: str) -> None:
    def run(group: FakeGroup, dispatch: bool) -> Any:
        loader = prepared(loader_of(Shuffled(source)), group, dispatch_batches=dispatch)
        epochs = [ids(loader) for _ in range(3)]
        resumed = prepared(loader_of(Shuffled(source)), group, dispatch_batches=dispatch)
        resumed.load_state_dict({**loader.state_dict(), "epoch": 1, "samples": 8, "batches": 2, "ended": False})
        return epochs, ids(resumed)

    read = run_fake_ranks(2, lambda group: run(group, False))
    sent = run_fake_ranks(2, lambda group: run(group, True))
    assert sent == read
    epochs, resumed = sent[0]
    assert epochs[0] != epochs[1] != epochs[2]
    assert resumed == epochs[1][2:]
