"""Iterables of batches in the place of a loader, on one rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from paceline import Accelerator
from paceline.data import looks_like_batches
from paceline.errors import DataError
from tests.unit.data.support import Numbers, PlainStream, Seat, ids, prepared

if TYPE_CHECKING:
    from pathlib import Path


class OfAnotherLibrary:
    """A loader by its methods alone."""

    def __init__(self, size: int) -> None:
        self.epochs: list[int] = []
        self._inner = DataLoader(Numbers(size), 2)

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __len__(self) -> int:
        return len(self._inner)

    def __iter__(self) -> Any:
        return iter(self._inner)


class Resumable(OfAnotherLibrary):
    """One that knows where it is."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.read = self._start = 0

    def __iter__(self) -> Any:
        start, self._start = self._start, 0
        self.read = start
        for batch in range(start, len(self)):
            self.read += 1
            yield torch.arange(2 * batch, min(2 * batch + 2, len(self._inner.dataset)))  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, int]:
        return {"read": self.read}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._start = state["read"]


def test_an_iterable_is_read_as_it_is() -> None:
    given = OfAnotherLibrary(5)
    loader = prepared(given)
    ends = [loader.end_of_dataloader for _ in loader]
    assert ends == [False, False, True]
    assert ids(loader) == [[0, 1], [2, 3], [4]]
    assert len(loader) == 3
    assert given.epochs == [0, 1]


def test_a_list_of_batches_is_a_loader() -> None:
    loader = prepared([torch.tensor([1, 2]), torch.tensor([3])])
    assert ids(loader) == ids(loader) == [[1, 2], [3]]


def test_an_iterator_gives_its_batches_once() -> None:
    loader = prepared(iter(DataLoader(Numbers(4), 2)))
    assert ids(loader) == [[0, 1], [2, 3]]
    with pytest.raises(DataError, match="A second epoch was begun over a _SingleProcessDataLoaderIter"):
        ids(loader)
    unsized = prepared(batch for batch in DataLoader(Numbers(4), 2))
    with pytest.raises(TypeError):
        len(unsized)


def test_its_position_is_saved() -> None:
    for make in (OfAnotherLibrary, Resumable):
        loader = prepared(make(9))
        for number, _ in enumerate(loader, 1):
            if number == 2:
                break
        again = prepared(make(9))
        again.load_state_dict(loader.state_dict())
        assert ids(again) == [[4, 5], [6, 7], [8]]
        assert ids(again) == [[0, 1], [2, 3], [4, 5], [6, 7], [8]]


@pytest.mark.parametrize("make", [lambda: OfAnotherLibrary(9), lambda: list(DataLoader(Numbers(9), 2))])
def test_one_process_prepares_it_as_several_do(make: Any, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, project_dir=tmp_path)
    loader = accelerator.prepare(make())
    for number, _ in enumerate(loader, 1):
        if number == 2:
            break
    accelerator.save_state(str(tmp_path / "state"))
    accelerator.free_memory()
    again = accelerator.prepare(make())
    accelerator.load_state(str(tmp_path / "state"))
    assert ids(again) == [[4, 5], [6, 7], [8]]


def test_several_ranks_need_to_be_told_whose_it_is() -> None:
    with pytest.raises(DataError, match=r"The loader OfAnotherLibrary has its own __iter__.*streams_are_sharded"):
        prepared(OfAnotherLibrary(4), Seat(0, 2))


@pytest.mark.parametrize(
    ("thing", "words"),
    [
        (Numbers(4), "A Numbers, which is a data set, was passed as a loader"),
        (PlainStream(4), "Pass DataLoader\\(plainstream, batch_size="),
        (None, "A NoneType was passed as a loader"),
        ({"a": [1]}, "A dict was passed as a loader"),
        ("train", "A str was passed as a loader"),
    ],
)
def test_what_yields_no_batches_is_refused(thing: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        prepared(thing)


def test_what_looks_like_batches() -> None:
    tensor = torch.ones(2)
    batches: tuple[Any, ...] = (
        [tensor],
        [{"x": tensor}],
        iter([tensor]),
        OfAnotherLibrary(2),
        Numbers(2),
        (x for x in [tensor]),
    )
    for thing in batches:
        assert looks_like_batches(thing), thing
    model = nn.Linear(2, 2)
    others: tuple[Any, ...] = (
        None,
        3,
        "text",
        {"x": tensor},
        [],
        [1, 2],
        list(model.parameters()),
        model,
        tensor,
        Numbers,
        object(),
    )
    for thing in others:
        assert not looks_like_batches(thing), thing
