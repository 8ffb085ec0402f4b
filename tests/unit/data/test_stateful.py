"""Streams with a state of their own: torchdata's loader, data sets of `datasets`, and any that can say where it is."""

from __future__ import annotations

import json
import logging
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from paceline.collectives import TorchGroup
from paceline.data.encoding import decode, encode
from paceline.errors import DataError, MissingExtraError
from tests.support.ranks import run_on_ranks
from tests.unit.data.support import Numbers, PlainStream, ids, prepared

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Resumable(IterableDataset[int]):
    """Shuffles by a generator that goes on from epoch to epoch, splits itself, and knows where it is.

    Counts its reads in this process; `forgets` makes the known-wrong twin, whose state says nothing.
    """

    def __init__(self, size: int, *, splits: bool = True, forgets: bool = False) -> None:
        self.size = size
        self.splits = splits
        self.forgets = forgets
        self.random = random.Random(5)
        self.order: list[int] = []
        self.position = 0
        self.reads = 0

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        step, first = (1, 0) if info is None or not self.splits else (info.num_workers, info.id)
        if not self.order:
            self.order = list(range(self.size))
            self.random.shuffle(self.order)
        while self.position < self.size:
            item = self.order[self.position]
            self.position += 1
            if self.position % step == first:
                self.reads += 1
                yield item
        self.order, self.position = [], 0

    def state_dict(self) -> dict[str, Any]:
        if self.forgets:
            return {"order": [], "position": 0, "random": self.random.getstate()}
        return {"order": self.order, "position": self.position, "random": self.random.getstate()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.position = list(state["order"]), state["position"]
        self.random.setstate(state["random"])


class TensorState(Resumable):
    """Keeps its position in a tensor that goes on changing."""

    def state_dict(self) -> dict[str, Any]:
        self.told = getattr(self, "told", torch.zeros(1, dtype=torch.int64))
        self.told[0] = self.position
        return {**super().state_dict(), "position": self.told}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict({**state, "position": int(state["position"])})


def saved(loader: Any) -> dict[str, Any]:
    """Return a loader's state as a checkpoint gives it back."""
    tensors: list[torch.Tensor] = []

    def taken(value: Any) -> Any:
        match value:
            case torch.Tensor():
                tensors.append(value.clone())
                return {"tensor": len(tensors) - 1}
            case dict():
                return {key: taken(item) for key, item in value.items()}
            case list():
                return [taken(item) for item in value]
            case _:
                return value

    def put_back(value: Any) -> Any:
        match value:
            case {"tensor": int(index), **rest} if not rest:
                return tensors[index]
            case dict():
                return {key: put_back(item) for key, item in value.items()}
            case list():
                return [put_back(item) for item in value]
            case _:
                return value

    found = put_back(json.loads(json.dumps(taken(loader.state_dict()))))
    assert isinstance(found, dict)
    return found


def stop_everywhere(make: Callable[[], Any], total: int, epochs: int = 2) -> None:
    """Stop after each batch of each epoch; what is left must be what the run that never stopped had left."""
    loader = make()
    states, seen = [saved(loader)], []
    for _ in range(epochs):
        for batch in loader:
            seen.append(batch.tolist())
            states.append(saved(loader))
    between = saved(loader)
    following = ids(loader)
    assert sorted(n for batch in seen for n in batch) == sorted([*range(total)] * epochs)
    for number, state in [*enumerate(states), (len(seen), between)]:
        again = make()
        again.load_state_dict(state)
        rest: list[Any] = []
        while len(rest) < len(seen) - number + len(following):
            rest += ids(again)
        assert rest == [*seen[number:], *following], number


@pytest.mark.parametrize("kind", [Resumable, TensorState])
@pytest.mark.parametrize("splits", [True, False])
def test_a_stream_with_a_state_goes_on_anywhere(kind: type[Resumable], splits: bool) -> None:
    stop_everywhere(lambda: prepared(DataLoader(kind(11, splits=splits), 3)), 11)


def test_nothing_is_read_twice(caplog: pytest.LogCaptureFixture) -> None:
    loader = prepared(DataLoader(Resumable(100), 5))
    for number, _ in enumerate(loader, 1):
        if number == 12:
            break
    data = Resumable(100)
    again = prepared(DataLoader(data, 5))
    again.load_state_dict(loader.state_dict())
    with caplog.at_level(logging.INFO, "paceline"):
        assert len(ids(again)) == 8
    assert data.reads == 40
    assert not caplog.records


def test_the_check_sees_a_state_that_says_nothing() -> None:
    with pytest.raises(AssertionError):
        stop_everywhere(lambda: prepared(DataLoader(Resumable(11, forgets=True), 3)), 11)


def test_plain_workers_over_a_stream_with_a_state_are_fast_forwarded(caplog: pytest.LogCaptureFixture) -> None:
    def make() -> Any:
        return prepared(DataLoader(Resumable(30), 2, num_workers=2))

    whole = ids(make())
    loader = make()
    for _, _ in zip(range(4), loader, strict=False):
        state = saved(loader)
    assert "stream" not in state
    again = make()
    again.load_state_dict(state)
    with caplog.at_level(logging.INFO, "paceline"):
        assert ids(again) == whole[4:]
    assert "reads and drops 4 batches of the stream Resumable" in caplog.text
    assert "use_stateful_dataloader=True" in caplog.text


def torchdata_loader(data: Any, **settings: Any) -> Any:
    module = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")
    return module.StatefulDataLoader(data, **settings)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("handed", [True, False])
def test_torchdatas_loader_goes_on_anywhere(workers: int, persistent: bool, handed: bool) -> None:
    if persistent and (not workers or not handed):
        pytest.skip("the same as without")
    pytest.importorskip("torchdata", reason="torchdata is not installed")
    settings: dict[str, Any] = {"batch_size": 4, "num_workers": workers, "persistent_workers": persistent}

    def make() -> Any:
        if handed:
            return prepared(torchdata_loader(Resumable(23), **settings))
        return prepared(DataLoader(Resumable(23), **settings), use_stateful_dataloader=True)

    stop_everywhere(make, 23, epochs=1 if workers else 2)


def test_torchdatas_loader_reads_nothing_twice_in_its_workers(caplog: pytest.LogCaptureFixture) -> None:
    def make() -> Any:
        return prepared(torchdata_loader(Resumable(60, splits=False), batch_size=4, num_workers=2, prefetch_factor=4))

    loader = make()
    for number, _ in enumerate(loader, 1):
        if number == 7:
            break
    again = make()
    again.load_state_dict(saved(loader))
    with caplog.at_level(logging.INFO, "paceline"):
        assert len(ids(again)) == 9
    assert not caplog.records


def test_torchdatas_loader_over_map_style_data_goes_on_by_arithmetic() -> None:
    def make() -> Any:
        return prepared(torchdata_loader(Numbers(14), batch_size=4, shuffle=True))

    stop_everywhere(make, 14)


def test_a_stream_without_a_state_in_torchdatas_loader_is_fast_forwarded() -> None:
    stop_everywhere(lambda: prepared(torchdata_loader(PlainStream(14), batch_size=4, num_workers=2)), 14, epochs=1)


def test_a_state_given_before_prepare_is_not_forgotten() -> None:
    loader = torchdata_loader(Resumable(11), batch_size=2)
    next(iter(loader))
    other = torchdata_loader(Resumable(11), batch_size=2)
    other.load_state_dict(loader.state_dict())
    with pytest.raises(DataError, match="had a state loaded before it was prepared"):
        prepared(other)


def test_torchdata_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str, *arguments: Any, **settings: Any) -> Any:
        if name.startswith("torchdata"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return imported(name, *arguments, **settings)

    imported = __import__
    monkeypatch.setattr("builtins.__import__", absent)
    with pytest.raises(MissingExtraError, match=r"paceline\[torchdata\]"):
        prepared(DataLoader(Numbers(4), 2), use_stateful_dataloader=True)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("buffer", [0, 7])
def test_data_sets_of_datasets_go_on_anywhere(workers: int, buffer: int) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")

    def make() -> Any:
        data = datasets.Dataset.from_dict({"n": list(range(23))}).to_iterable_dataset(num_shards=4)
        if buffer:
            data = data.shuffle(seed=3, buffer_size=buffer)
        columns = data.map(lambda row: {"n": row["n"]}).with_format("torch")
        kind = torchdata_loader if workers else DataLoader
        loader: Any = kind(columns, batch_size=4, num_workers=workers, collate_fn=numbers)
        return prepared(loader)

    stop_everywhere(make, 23, epochs=1 if workers else 2)


def numbers(rows: list[Any]) -> torch.Tensor:
    return torch.stack([row["n"] for row in rows])


def resume_on_ranks(splits: bool, workers: int, config: dict[str, Any]) -> dict[str, Any]:
    group = TorchGroup()

    def make() -> Any:
        data = Resumable(37, splits=splits)
        kind: Any = torchdata_loader if workers else DataLoader
        return prepared(kind(data, batch_size=3, num_workers=workers), group, **config), data

    loader, _ = make()
    whole, states = [], []
    for batch in loader:
        states.append(saved(loader))
        whole.append((batch.tolist(), loader.counts))
    for number, state in [(1, states[1]), (4, states[4]), (len(states) - 1, states[-1])]:
        again, data = make()
        again.load_state_dict(state)
        rest = [(batch.tolist(), again.counts) for batch in again]
        if number < len(states) - 1:
            assert [counts for _, counts in rest] == [counts for _, counts in whole[number + 1 :]]
            # Padding may be other samples: what it repeats was read before the stop.
            real = [counts.real[group.rank] for _, counts in rest]
            kept = [batch[:n] for (batch, _), n in zip(rest, real, strict=True)]
            assert kept == [batch[:n] for (batch, _), n in zip(whole[number + 1 :], real, strict=True)]
        else:
            assert again.epoch == 2
        # Up to two more where the end is looked for: this data set has gone back to its start by then.
        assert workers or data.reads <= 37 + 2
    return {"seen": [n for batch, counts in whole for n in batch[: counts.real[group.rank]]]}


@pytest.mark.parametrize("splits", [True, False])
@pytest.mark.parametrize("config", [{}, {"even_batches": False}, {"dispatch_batches": True}])
def test_ranks_go_on_together(splits: bool, config: dict[str, Any]) -> None:
    results = run_on_ranks(2, resume_on_ranks, splits, 0, config)
    assert sorted(n for result in results for n in result["seen"]) == list(range(37))


@pytest.mark.slow
def test_ranks_with_workers_of_torchdata_go_on_together() -> None:
    pytest.importorskip("torchdata", reason="torchdata is not installed")
    results = run_on_ranks(2, resume_on_ranks, True, 2, {})
    assert sorted(n for result in results for n in result["seen"]) == list(range(37))


def test_states_become_json_and_tensors_and_come_back() -> None:
    state = {
        "random": random.Random(3).getstate(),
        "numpy": np.random.default_rng(3).bit_generator.state,
        "old": np.random.RandomState(3).get_state(),
        "array": np.arange(6, dtype=np.uint16).reshape(2, 3),
        "bytes": b"\x00\xff",
        3: (None, True, 1.5, "text", np.float32(0.5)),
    }
    found = decode(encode(state, "it"))
    assert found["random"] == state["random"]
    assert found["numpy"] == state["numpy"]
    assert np.array_equal(found["old"][1], state["old"][1])  # type: ignore[index]
    assert np.array_equal(found["array"], state["array"])  # type: ignore[arg-type]
    assert (found["array"].dtype, found["bytes"], found[3]) == (np.uint16, b"\x00\xff", (None, True, 1.5, "text", 0.5))


def test_a_state_that_cannot_be_saved_names_loader_and_place() -> None:
    class Odd(Resumable):
        def state_dict(self) -> dict[str, Any]:
            return {"inner": [{"lock": {1, 2}}]}

    loader = prepared(DataLoader(Odd(11), 2))
    for _ in loader:
        with pytest.raises(
            DataError, match=r"stream Odd of a prepared loader contains a set at state\['state'\].*\['lock'\]"
        ):
            loader.state_dict()
        break
