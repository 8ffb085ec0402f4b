"""Samplers, data sets and collate functions with a state of their own: a resumed run reads the same."""

from __future__ import annotations

import json
import logging
import random
from collections import Counter, OrderedDict, defaultdict, deque
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler, default_collate

from paceline.checkpoint import from_plain, to_plain
from paceline.collectives import FakeGroup, run_fake_ranks
from paceline.data import ActiveLoaders
from paceline.data.randomness import IsolatedRng
from paceline.environment.object_state import ObjectState, OwnGenerators
from tests.unit.data.support import Numbers, PlainStream, prepared

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SIZE = 14

GENERATORS: dict[str, Callable[[], Any]] = {
    "random": lambda: random.Random(3),
    "numpy": lambda: np.random.default_rng(3),
    "legacy numpy": lambda: np.random.RandomState(3),
    "torch": lambda: torch.Generator().manual_seed(3),
}

global_generator = random.Random(4)


def draw(generator: Any) -> float:
    """Draw a number from a generator of any kind."""
    if isinstance(generator, torch.Generator):
        return float(torch.randn((), generator=generator))
    return float(generator.gauss(0, 1) if isinstance(generator, random.Random) else generator.normal())


class Order(Sampler[int]):
    """Orders by numbers from a generator under a name of its own."""

    def __init__(self, generator: Any) -> None:
        self.source = generator

    def __len__(self) -> int:
        return SIZE

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(range(SIZE), key=lambda _: draw(self.source)))


class CountingOrder(Order):
    """Counts its epochs by itself."""

    def __init__(self) -> None:
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter(random.Random(self.epoch).sample(range(SIZE), SIZE))


class InPlaceOrder(Order):
    """Shuffles its own list, in which the last order still is."""

    def __init__(self) -> None:
        self.indices = list(range(SIZE))

    def __iter__(self) -> Iterator[int]:
        random.shuffle(self.indices)
        return iter(list(self.indices))


class Noise:
    """A transform with a generator, a number and a buffer."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator
        self.calls = 0
        self.recent: deque[float] = deque(maxlen=3)

    def __call__(self, item: int) -> float:
        self.calls += 1
        self.recent.append(draw(self.generator))
        return item + self.calls + sum(self.recent)


class NoisyNumbers(Numbers):
    """A map-style data set with a transform that has a state."""

    def __init__(self, generator: Any) -> None:
        super().__init__(SIZE)
        self.transform = Noise(generator)

    def __getitem__(self, index: int) -> Any:
        return self.transform(index)


class GlobalNoise(Numbers):
    """Draws from a global variable of its module."""

    def __getitem__(self, index: int) -> Any:
        return index + global_generator.random()


class StatefulNumbers(Numbers):
    """A map-style data set with a state that it saves itself."""

    def __init__(self) -> None:
        super().__init__(SIZE)
        self.file = iter(range(10**6))
        self.line = 0

    def __getitem__(self, index: int) -> Any:
        self.line = next(self.file)
        return index, self.line

    def state_dict(self) -> dict[str, int]:
        return {"line": self.line}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.line = state["line"]
        self.file = iter(range(self.line + 1, 10**6))


class OwnShuffle(IterableDataset[float]):
    """A stream that shuffles with a generator of its own, and counts its epochs."""

    def __init__(self, generator: Any) -> None:
        self.shuffler = generator
        self.epoch = 0

    def __iter__(self) -> Iterator[float]:
        for number in sorted(range(SIZE), key=lambda _: draw(self.shuffler)):
            yield number + 100 * self.epoch
        self.epoch += 1


class OwnCollate:
    """A collate function with a state."""

    def __init__(self, generator: Any) -> None:
        self.scale = generator

    def __call__(self, items: list[Any]) -> Any:
        return default_collate(items) * draw(self.scale)


LOADERS: dict[str, Callable[[Any], Any]] = {
    "sampler": lambda new: DataLoader(Numbers(SIZE), 4, sampler=Order(new())),
    "sampler that counts epochs": lambda new: DataLoader(Numbers(SIZE), 4, sampler=CountingOrder()),
    "sampler that shuffles its list": lambda new: DataLoader(Numbers(SIZE), 4, sampler=InPlaceOrder()),
    "transform": lambda new: DataLoader(NoisyNumbers(new()), 4, shuffle=True),
    "global variable": lambda new: DataLoader(GlobalNoise(SIZE), 4, shuffle=True),
    "data set with a state": lambda new: DataLoader(StatefulNumbers(), 4, shuffle=True),
    "collate": lambda new: DataLoader(Numbers(SIZE), 4, collate_fn=OwnCollate(new())),
    "stream": lambda new: DataLoader(OwnShuffle(new()), 4),
    "collate of a stream": lambda new: DataLoader(PlainStream(SIZE), 4, collate_fn=OwnCollate(new())),
}


def make(kind: str, generator: str) -> Any:
    global_generator.seed(4)
    return prepared(LOADERS[kind](GENERATORS[generator]))


def read(loader: Any, epochs: int, stop: int = -1) -> tuple[list[str], Any]:
    """Read epochs, or up to batch number `stop` (an eager one: the state is taken there); return them and the state."""
    seen: list[str] = []
    for _ in range(epochs):
        for batch in loader:
            seen.append(str(batch))
            if len(seen) == stop:
                return seen, json.dumps(portable(loader.state_dict()))
    return seen, None


def portable(state: Any) -> Any:
    from paceline.checkpoint import to_plain

    return to_plain(state, "loader")


def resumed(loader: Any, state: str) -> Any:
    from paceline.checkpoint import from_plain

    loader.load_state_dict(from_plain(json.loads(state)))
    return loader


CASES = [(kind, "random") for kind in LOADERS] + [
    (kind, name) for kind in ("sampler", "transform", "stream") for name in ("numpy", "legacy numpy", "torch")
]


@pytest.mark.parametrize(("kind", "generator"), CASES)
def test_what_reads_the_data_is_resumed_with_its_own_state(kind: str, generator: str) -> None:
    whole, _ = read(make(kind, generator), 3)
    assert len(whole) == 12
    for stop in (2, 4, 6):
        seen, state = read(make(kind, generator), 3, stop)
        assert seen == whole[:stop]
        loader = resumed(make(kind, generator), state)
        assert read(loader, 3, len(whole) - stop)[0] == whole[stop:], stop


def test_a_generator_seeded_by_chance_is_resumed() -> None:
    def chance(kind: str) -> Any:
        return prepared(LOADERS[kind](random.Random))

    for kind in ("sampler", "stream", "transform"):
        loader = chance(kind)
        seen, state = read(loader, 3, 6)
        rest, _ = read(loader, 1)
        del seen
        again = resumed(chance(kind), state)
        # The running loop was left: the loader begins its next epoch, the resumed one finishes this one.
        assert len(read(again, 1)[0]) == 2
        if kind != "transform":
            assert read(again, 1)[0] == rest, kind


@pytest.mark.parametrize("kind", ["transform", "collate", "stream"])
@pytest.mark.parametrize("persistent", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_generators_in_workers_do_not_depend_on_what_they_read_before(kind: str, persistent: bool) -> None:
    def make() -> Any:
        generator = random.Random(3)
        settings: dict[str, Any] = {"num_workers": 1, "persistent_workers": persistent}
        if kind == "stream":
            return prepared(DataLoader(OwnOrder(generator), 4, **settings))
        if kind == "collate":
            return prepared(DataLoader(Numbers(SIZE), 4, collate_fn=OwnCollate(generator), **settings))
        return prepared(DataLoader(DrawingNumbers(generator), 4, **settings))

    whole, _ = read(make(), 2)
    _, state = read(make(), 2, 6)
    assert read(resumed(make(), state), 1)[0] == whole[6:]


class DrawingNumbers(NoisyNumbers):
    """Draws, and keeps nothing else."""

    def __getitem__(self, index: int) -> Any:
        return index + draw(self.transform.generator)


class OwnOrder(OwnShuffle):
    """Shuffles, and counts nothing."""

    def __iter__(self) -> Iterator[float]:
        yield from sorted(range(SIZE), key=lambda _: draw(self.shuffler))


def test_an_epoch_does_not_depend_on_how_far_the_last_one_was_read() -> None:
    left, whole = make("stream", "random"), make("stream", "random")
    read(left, 1, 1)
    read(whole, 1)
    assert [b % 100 for batch in left for b in batch.tolist()] == [b % 100 for batch in whole for b in batch.tolist()]


class Tape(IterableDataset[int]):
    """Keeps an open iterator, which nobody can save."""

    def __init__(self) -> None:
        self.lines = iter(range(1000))

    def __iter__(self) -> Iterator[int]:
        for _, line in zip(range(8), self.lines, strict=False):
            yield line


def test_what_cannot_be_saved_is_named(caplog: pytest.LogCaptureFixture) -> None:
    _, state = read(prepared(DataLoader(Tape(), 4)), 2, 3)
    with caplog.at_level(logging.WARNING):
        resumed(prepared(DataLoader(Tape(), 4)), state)
    assert "dataset.lines of the loader over Tape had changed" in caplog.text


class Cache(Numbers):
    """Opens a file when it is first read; its position in the cache belongs to the cache."""

    def __init__(self) -> None:
        super().__init__(SIZE)
        self.reader: Any = None
        self.block = -1

    def __getitem__(self, index: int) -> int:
        if self.block != index // 4:
            self.block, self.reader = index // 4, object()
        assert self.reader is not None
        return index


def test_attributes_that_belong_to_something_that_cannot_be_saved_stay_as_they_are(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, state = read(prepared(DataLoader(Cache(), 4)), 1, 2)
    loader = prepared(DataLoader(cache := Cache(), 4))
    resumed(loader, state)
    assert (cache.block, cache.reader) == (-1, None)
    assert read(loader, 1)[0] == ["tensor([ 8,  9, 10, 11])", "tensor([12, 13])"]


def test_what_a_script_sets_before_the_loop_is_no_state() -> None:
    first = Numbers(SIZE)
    state = ObjectState({"dataset": first})
    second = Numbers(20)
    ObjectState({"dataset": second}).restore(state.capture())
    assert second.size == 20


def test_generators_of_epochs_differ_and_the_first_is_left_as_it_is() -> None:
    generators = OwnGenerators({"dataset": NoisyNumbers(source := random.Random(3))})
    drawn = []
    for epoch in (0, 1, 2, 0, 1):
        generators.begin(epoch)
        drawn.append(source.random())
    assert drawn[0] == random.Random(3).random()
    assert len(set(drawn)) == 3
    assert drawn[3:] == drawn[:2]


def test_a_state_that_no_checkpoint_can_contain_is_named_when_it_is_missed(caplog: pytest.LogCaptureFixture) -> None:
    class Stateful:
        def state_dict(self) -> dict[str, Any]:
            return {"file": object()}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise AssertionError(state)

    class Reading(Numbers):
        def __init__(self) -> None:
            super().__init__(SIZE)
            self.reader = Stateful()

    loader = prepared(DataLoader(Reading(), 2))
    next(iter(loader))
    state = loader.state_dict()
    json.dumps(state["objects"]["each"]["states"])
    with caplog.at_level(logging.WARNING):
        prepared(DataLoader(Reading(), 2)).load_state_dict(state)
    assert "dataset.reader" in caplog.text


class GlobalDraws(Numbers):
    """Draws from the global generators in this process."""

    def __getitem__(self, index: int) -> Any:
        return index + random.random()


@pytest.mark.parametrize("stop", [0, 2, 4])
def test_a_signal_stops_before_a_batch_is_read(stop: int) -> None:
    class Stopped(Exception):
        pass

    def act(read: Any) -> None:
        assert read is loader
        if len(seen) == stop:
            state["position"], state["random"] = loader.state_dict(), random.getstate()
            raise Stopped

    def make() -> Any:
        return prepared(DataLoader(GlobalDraws(SIZE), 4, shuffle=True), active=active)

    active = ActiveLoaders()
    random.seed(1)
    first = make()
    whole = [batch.tolist() for _ in range(2) for batch in first]
    active.before_batch = act
    random.seed(1)
    seen: list[Any] = []
    state: dict[str, Any] = {}
    loader = make()
    with pytest.raises(Stopped):
        seen.extend(batch.tolist() for _ in range(2) for batch in loader)
    active.before_batch = None
    again = make()
    again.load_state_dict(state["position"])
    random.setstate(state["random"])
    assert seen + [batch.tolist() for _ in range(2) for batch in again][: 8 - stop] == whole


class NormalStream(IterableDataset[float]):
    """Draws normal numbers, of which NumPy keeps every second."""

    def __iter__(self) -> Iterator[float]:
        for number in range(SIZE):
            yield number + np.random.randn()


@pytest.mark.parametrize("kind", ["stream", "map"])
def test_what_rank_0_draws_for_all_ranks_is_resumed(kind: str) -> None:
    def run(group: FakeGroup) -> None:
        def make() -> Any:
            data: Any = NormalStream() if kind == "stream" else DrawingNumbers(random.Random(3))
            return prepared(DataLoader(data, 2), group, dispatch_batches=True)

        whole, _ = read(make(), 2)
        for stop in (1, 2, 5):
            seen, state = read(make(), 2, stop)
            assert seen + read(resumed(make(), state), 2, len(whole) - stop)[0] == whole

    run_fake_ranks(2, run)


def test_an_isolated_state_within_itself_changes_nothing() -> None:
    def drawn(nested: bool) -> list[float]:
        isolated = IsolatedRng(1)
        with isolated():
            numbers = [random.random(), np.random.randn()]
            with isolated() if nested else nullcontext():
                numbers += [random.random(), np.random.randn(), float(torch.rand(()))]
            return [*numbers, random.random(), np.random.randn(), float(torch.rand(()))]

    assert drawn(nested=True) == drawn(nested=False)


class Keeper:
    """Keeps numbers in containers of many kinds."""

    def __init__(self) -> None:
        self.history: dict[str, list[float]] = {}
        self.by_name: defaultdict[str, list[int]] = defaultdict(list)
        self.by_phase: dict[str, defaultdict[str, list[int]]] = {"train": defaultdict(list)}
        self.counts: Counter[str] = Counter()
        self.ordered: OrderedDict[str, int] = OrderedDict()
        self.rows: list[dict[str, float]] = []
        self.window: deque[tuple[int, float]] = deque(maxlen=2)
        self.pairs = [[1, 2], [3]]
        self.best: Any = None
        self.averages: dict[str, torch.Tensor] = {}
        self.seen: dict[int, set[int]] = {}
        self.number: Any = 0.0

    def change(self, times: int) -> None:
        """Do what each step does, in place where that is possible."""
        for step in range(times):
            self.history.setdefault("loss", []).append(0.5)
            self.by_name[f"a.{step}"].append(step)
            self.by_phase["train"]["x"].append(step)
            self.counts["steps"] += 1
            self.ordered[f"z{step}"] = step
            self.rows.append({"step": step, "loss": float("nan") if step == 1 else 0.5})
            self.window.append((step, 0.5))
            self.pairs[0].append(step)
            self.best = {"step": step, "metrics": [1, 2, {"deep": (3, None)}]}
            self.averages.setdefault("w", torch.zeros(3)).add_(step)
            self.seen.setdefault(step, set()).add(7)
            self.number = np.float64(step)


def test_containers_in_containers_are_restored_with_what_was_added_to_them() -> None:
    old, new = Keeper(), Keeper()
    state, later = ObjectState({"keeper": old}), ObjectState({"keeper": new})
    old.change(3)
    saved = state.capture()
    assert saved["lost"] == []
    later.restore(from_plain(json.loads(json.dumps(to_plain(saved, "keeper")))))
    assert set(vars(new)) == set(vars(old))
    for _ in range(2):
        torch.testing.assert_close(new.averages["w"], old.averages["w"])
        for name in set(vars(old)) - {"averages"}:
            assert repr(getattr(new, name)).replace("np.float64(2.0)", "2.0") == repr(getattr(old, name)).replace(
                "np.float64(2.0)", "2.0"
            ), name
        # They are of the same kinds, so that the next steps do the same.
        old.change(1)
        new.change(1)


class Late:
    """Gets its attributes only when it is used."""


def test_attributes_of_an_object_that_had_none() -> None:
    old, new = Late(), Late()
    state, later = ObjectState({"late": old}), ObjectState({"late": new})
    vars(old)["count"] = 3
    later.restore(state.capture())
    assert vars(new) == {"count": 3}


class Weighted:
    """Counts, and writes into a tensor that is too large to be saved."""

    def __init__(self, size: int) -> None:
        self.weights = torch.ones(size)
        self.records: list[Any] = []


def test_what_is_written_in_place_and_cannot_be_saved_is_named() -> None:
    for size, lost in ((8, []), (5000, ["weighted.weights"])):
        weighted = Weighted(size)
        state = ObjectState({"weighted": weighted})
        assert state.capture()["lost"] == []
        weighted.weights[1] = 2
        assert state.capture()["lost"] == lost
    state = ObjectState({"weighted": weighted})
    weighted.records.append(Weighted(1))
    assert state.capture()["lost"], "an object in a list cannot be made again"


class InMemory:
    """Many samples, as tensors or as pairs of a tensor and a label."""

    def __init__(self, has_labels: bool) -> None:
        rows = list(torch.arange(200.0).reshape(100, 2))
        self.samples: list[Any] = list(zip(rows, range(100), strict=True)) if has_labels else rows

    def texts(self) -> list[str]:
        return list(map(str, self.samples))


def shuffled(data: InMemory) -> None:
    random.Random(0).shuffle(data.samples)


def written(data: InMemory) -> None:
    sample = data.samples[7]
    (sample[0] if isinstance(sample, tuple) else sample).mul_(3)


def replaced(data: InMemory) -> None:
    data.samples[3] = data.samples[4]


def shortened(data: InMemory) -> None:
    del data.samples[50:]


@pytest.mark.parametrize("has_labels", [False, True])
@pytest.mark.parametrize("change", [shuffled, written, replaced, shortened])
def test_many_samples_in_memory_are_saved_if_they_have_changed(
    change: Callable[[InMemory], None], has_labels: bool
) -> None:
    first, second = InMemory(has_labels), InMemory(has_labels)
    state = ObjectState({"data": first}, max_elements=2**22)
    assert state.capture()["values"] == {}
    change(first)
    saved = from_plain(to_plain(state.capture(), "the data"))
    ObjectState({"data": second}, max_elements=2**22).restore(saved)
    assert second.texts() == first.texts()
