from __future__ import annotations

import itertools
import json
import logging
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, Sampler

from paceline.data import ActiveLoaders
from paceline.data.epoch_plan import KEYS_AT_A_TIME
from paceline.data.sample_order import TensorOrder
from paceline.errors import DataError
from tests.unit.data.support import Numbers, PlainStream, Seat, ids, prepared

if TYPE_CHECKING:
    from collections.abc import Iterator


def shuffled(samples: int = 40, batch: int = 3, **settings: Any) -> DataLoader[int]:
    return DataLoader(Numbers(samples), batch, shuffle=True, **settings)


def run_epochs(loader: Any, number: int) -> list[list[list[int]]]:
    return [ids(loader) for _ in range(number)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 5, 13])
def test_resume_equals_never_stopped(workers: int, stop: int) -> None:
    settings: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
    never_stopped = run_epochs(prepared(shuffled(**settings)), 3)
    loader = prepared(shuffled(**settings))
    ids(loader)
    seen, state = [], {}
    for number, batch in enumerate(loader, 1):
        seen.append(batch.tolist())
        if number == stop:
            state = json.loads(json.dumps(loader.state_dict()))
    resumed = prepared(shuffled(**settings), data_seed=99)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert [*seen[:stop], *ids(resumed)] == never_stopped[1]
    assert ids(resumed) == never_stopped[2]


class Augmented(Numbers):
    """Adds to every index what it draws."""

    def __getitem__(self, index: int) -> Any:
        return index, random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_what_workers_draw_is_repeated(context: str) -> None:
    def make(rank: int = 0) -> Any:
        loader = DataLoader(Augmented(24), 4, shuffle=True, num_workers=2, multiprocessing_context=context)
        return prepared(loader, Seat(rank, 2))

    def read(loader: Any) -> list[tuple[float, ...]]:
        return [tuple(torch.stack(batch).flatten().tolist()) for batch in loader]

    loader, state = make(), {}
    first = read(loader)
    for number, _ in enumerate(loader, 1):
        if number == 1:
            state = loader.state_dict()
    resumed = make()
    resumed.load_state_dict(state)
    rest = read(resumed)
    # The second epoch again, from its beginning.
    whole = make()
    whole.set_epoch(1)
    second = read(whole)
    assert second[1:] == rest
    drawn = [value for batch in (*first, *second, *read(make(1))) for value in batch if value % 1]
    assert len(set(drawn)) == len(drawn) > 100


def test_a_position_at_the_end_goes_on_with_the_next_epoch() -> None:
    loader = prepared(shuffled(12, 3))
    for _ in loader:
        state = loader.state_dict()
    assert state["samples"] == 12
    resumed = prepared(shuffled(12, 3))
    resumed.load_state_dict(state)
    assert ids(resumed) == ids(loader)
    assert resumed.state_dict()["epoch"] == 2


@pytest.mark.parametrize("sizes", [(2, 1), (1, 3), (3, 2)])
def test_resume_with_other_ranks_and_the_same_global_batch(sizes: tuple[int, int]) -> None:
    def loaders(size: int) -> list[Any]:
        return [prepared(shuffled(100, 6 // size), Seat(rank, size), even_batches=False) for rank in range(size)]

    before, after = loaders(sizes[0]), loaders(sizes[1])
    seen: list[int] = []
    for parts in zip(*map(iter, before), strict=False):
        seen += torch.cat(parts).tolist()
        if len(seen) == 42:
            break
    states = [loader.state_dict() for loader in before]
    assert all(state == states[0] for state in states)
    for loader in after:
        loader.load_state_dict(states[0])
    rest = [number for loader in after for batch in ids(loader) for number in batch]
    assert sorted(seen + rest) == list(range(100))


def test_seeking_reads_nothing_that_was_used(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    take_batches = TensorOrder.take_batches

    def counted(order: TensorOrder, start: int, size: int, step: int, number: int) -> list[list[int]]:
        taken.append((start, size * number))
        return take_batches(order, start, size, step, number)

    monkeypatch.setattr(TensorOrder, "take_batches", counted)
    for samples in (10_000, 900_000):
        data = Numbers(1_000_000)
        loader = prepared(DataLoader(data, 10, shuffle=True))
        loader.load_state_dict({"version": 1, "epoch": 0, "samples": samples, "batches": samples // 10, "seed": 7})
        next(iter(loader))
        assert data.reads == 10
    assert [start for start, _ in taken] == [10_000, 900_000]
    assert max(number for _, number in taken) <= KEYS_AT_A_TIME


def test_passes_number_epochs_also_when_broken_off() -> None:
    loader, other = prepared(shuffled()), prepared(shuffled())
    epochs = run_epochs(other, 4)
    assert len({str(epoch) for epoch in epochs}) == 4
    for batch in loader:
        assert batch.tolist() == epochs[0][0]
        assert loader.epoch == 0
        break
    assert ids(loader) == epochs[1]
    assert loader.epoch == 2
    loader.set_epoch(0)
    assert ids(loader) == epochs[0]
    assert ids(loader) == epochs[1]


def test_the_position_after_a_break_is_where_the_loop_was_left() -> None:
    loader = prepared(shuffled())
    for number, _ in enumerate(loader):
        if number == 4:
            break
    state = loader.state_dict()
    assert (state["epoch"], state["samples"], state["batches"]) == (0, 15, 5)
    resumed = prepared(shuffled())
    resumed.load_state_dict(state)
    assert ids(resumed) == ids(prepared(shuffled()))[5:]


def test_setting_the_epoch_that_is_resumed_keeps_the_position() -> None:
    loader = prepared(shuffled(12, 3))
    state = {"version": 1, "epoch": 3, "samples": 6, "batches": 2, "seed": 7}
    loader.load_state_dict(state)
    loader.set_epoch(3)
    assert len(ids(loader)) == 2
    loader.load_state_dict(state)
    loader.set_epoch(4)
    assert len(ids(loader)) == 4


def test_a_position_of_another_kind_is_refused() -> None:
    with pytest.raises(DataError, match="version 2 and lacks samples, batches"):
        prepared(shuffled()).load_state_dict({"version": 2, "epoch": 0, "seed": 1})


def test_a_pass_leaves_the_programs_randomness_alone() -> None:
    loader = prepared(DataLoader(Numbers(20), 2, sampler=RandomlyBySeveral(20)))
    torch.manual_seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    ids(loader)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_the_seed_comes_from_the_generator_or_the_global_seed() -> None:
    def seed(generator: torch.Generator | None, **config: Any) -> int:
        loader = shuffled(generator=generator)
        return int(prepared(loader, data_seed=None, **config).state_dict()["seed"])

    torch.manual_seed(123)
    assert seed(None) == 123
    assert seed(torch.Generator().manual_seed(5)) == 5
    drawn = seed(None, use_seedable_sampler=False)
    assert drawn not in (123, seed(None, use_seedable_sampler=False))


class RandomlyBySeveral(Sampler[int]):
    """Draws from three global sources and counts its runs."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.runs = 0
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        self.runs += 1
        order = torch.randperm(self.size).tolist()
        random.shuffle(order)
        return iter([order[i] for i in np.random.permutation(self.size)])


class Buckets(Sampler[list[int]]):
    """Batches of different sizes, shuffled with `random`."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[list[int]]:
        ends = [0, *np.cumsum(self.sizes).tolist()]
        batches = [list(range(a, b)) for a, b in itertools.pairwise(ends)]
        random.shuffle(batches)
        return iter(batches)


class Unsized(Buckets):
    """The same without a length."""

    __len__ = None  # type: ignore[assignment]


def resumed_everywhere(make: Any) -> None:
    whole = run_epochs(prepared(make()), 2)
    assert whole[0] != whole[1]
    for stop in range(1, len(whole[0])):
        loader = prepared(make())
        for number, _ in enumerate(loader, 1):
            if number == stop:
                break
        again = prepared(make())
        again.load_state_dict(loader.state_dict())
        assert ids(again) == whole[0][stop:]
        assert ids(again) == whole[1]


def test_any_sampler_is_resumed_exactly() -> None:
    sampler = RandomlyBySeveral(20)
    resumed_everywhere(lambda: DataLoader(Numbers(20), 3, sampler=RandomlyBySeveral(20)))
    run_epochs(prepared(DataLoader(Numbers(20), 3, sampler=sampler)), 2)
    assert (sampler.runs, sampler.epochs) == (2, [0, 1])


@pytest.mark.parametrize("kind", [Buckets, Unsized])
def test_any_batch_sampler_is_resumed_exactly(kind: type[Buckets]) -> None:
    resumed_everywhere(lambda: DataLoader(Numbers(20), batch_sampler=kind([3, 1, 4, 2, 5, 5])))


class InOrder(Buckets):
    """Batches of these sizes, one after the other."""

    def __iter__(self) -> Iterator[list[int]]:
        ends = [0, *np.cumsum(self.sizes).tolist()]
        return iter([list(range(a, b)) for a, b in itertools.pairwise(ends)])


class InOrderUnsized(InOrder):
    """The same without a length."""

    __len__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("kind", [InOrder, InOrderUnsized])
def test_a_position_within_a_batch_of_other_batches_is_refused(kind: type[Buckets]) -> None:
    loader = prepared(DataLoader(Numbers(20), batch_sampler=kind([3, 1, 4, 2, 5, 5])))
    batches = iter(loader)
    next(batches), next(batches)
    fitting = prepared(DataLoader(Numbers(20), batch_sampler=kind([4, 6, 5, 5])))
    fitting.load_state_dict(loader.state_dict())
    assert ids(fitting) == [[*range(4, 10)], [*range(10, 15)], [*range(15, 20)]]
    other = prepared(DataLoader(Numbers(20), batch_sampler=kind([3, 7, 5, 5])))
    other.load_state_dict(loader.state_dict())
    with pytest.raises(DataError, match=r"after 4 samples of its epoch, .* a batch that ends after 10"):
        ids(other)


def test_a_sampler_with_its_own_generator_is_resumed_exactly() -> None:
    def make() -> DataLoader[int]:
        generator = torch.Generator().manual_seed(3)
        sampler = torch.utils.data.SubsetRandomSampler(range(1, 20, 2), generator=generator)
        return DataLoader(Numbers(20), 3, sampler=sampler)

    resumed_everywhere(make)


def test_a_random_sampler_keeps_its_settings() -> None:
    sampler = RandomSampler(Numbers(5), replacement=True, num_samples=200)
    drawn = [n for batch in ids(prepared(DataLoader(Numbers(5), 8, sampler=sampler))) for n in batch]
    assert len(drawn) == 200
    assert set(drawn) == set(range(5))
    longer = RandomSampler(Numbers(5), num_samples=12)
    drawn = [n for batch in ids(prepared(DataLoader(Numbers(5), 4, sampler=longer))) for n in batch]
    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == list(range(5))
    assert len(drawn) == 12


def test_a_distributed_sampler_is_taken_over_and_not_split_twice() -> None:
    def make(rank: int) -> tuple[Any, Any]:
        sampler: DistributedSampler[int] = DistributedSampler(Numbers(24), 2, rank, shuffle=True, seed=5)
        loader = DataLoader(Numbers(24), 3, sampler=sampler)
        return prepared(loader, Seat(rank, 2), data_seed=None), sampler

    pairs = [make(rank) for rank in range(2)]
    parts = [ids(loader) for loader, _ in pairs]
    assert sorted(n for part in parts for batch in part for n in batch) == list(range(24))
    assert pairs[0][0].state_dict()["seed"] == 5
    loader, sampler = pairs[0]
    sampler.set_epoch(0)
    second = ids(loader)
    assert second != parts[0]
    sampler.set_epoch(1)
    assert ids(loader) == second


def test_a_distributed_sampler_that_splits_in_its_own_way_is_refused() -> None:
    class Own(DistributedSampler[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(self.rank, 10, self.num_replicas))

    loader = DataLoader(Numbers(10), 2, sampler=Own(Numbers(10), 2, 0))
    with pytest.raises(DataError, match="Own yields one part of 2"):
        prepared(loader, Seat(0, 2))


def test_a_loader_without_batches() -> None:
    single: DataLoader[int] = DataLoader(Numbers(6), batch_size=None, shuffle=True)
    assert sorted(prepared(single)) == list(range(6))
    listed = DataLoader(
        Listed(10), batch_size=None, sampler=BatchSampler(RandomSampler(Numbers(10)), 4, drop_last=False)
    )
    loader = prepared(listed)
    assert [len(batch) for batch in loader] == [4, 4, 2]
    assert sorted(n for batch in loader for n in batch) == list(range(10))


class Listed(Numbers):
    """Is asked for a whole batch at a time."""

    def __getitem__(self, index: Any) -> Any:
        assert isinstance(index, list)
        return index


def fail_within(loader: Any) -> None:
    for _ in loader:
        raise ZeroDivisionError


def test_breaking_out_of_an_inner_loop_leaves_the_outer_loader_active() -> None:
    active = ActiveLoaders()
    outer, inner = prepared(shuffled(), active=active), prepared(shuffled(8, 2), active=active)
    for _ in outer:
        assert active.current is outer
        for _ in inner:
            assert active.current is inner
            break
        assert active.current is outer
        kept = iter(inner)
        next(kept)
        assert active.current is inner
        del kept
        assert active.current is outer
        with pytest.raises(ZeroDivisionError):
            fail_within(inner)
        assert active.current is outer
    assert active.current is None


def test_a_prepared_loader_is_a_loader_and_is_prepared_once() -> None:
    loader = prepared(shuffled(40, 4, num_workers=1, timeout=9), Seat(0, 2), split_batches=True)
    assert isinstance(loader, DataLoader)
    assert prepared(loader) is loader
    assert (loader.num_workers, loader.timeout, loader.batch_size, len(loader)) == (1, 9, 2, 10)


def test_two_passes_at_once_do_not_disturb_each_other() -> None:
    loader = prepared(shuffled())
    pairs = [(a.tolist(), b.tolist()) for a, b in zip(loader, loader, strict=True)]
    other = prepared(shuffled())
    assert [a for a, _ in pairs] == ids(other)
    assert [b for _, b in pairs] == ids(other)


class OwnLoop(DataLoader[int]):
    """Iterates in its own way."""

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            yield batch + 100


@pytest.mark.parametrize("make", [lambda: Numbers(8), lambda: PlainStream(8)])
def test_persistent_workers_that_a_later_pass_took_are_missed(make: Any) -> None:
    loader = prepared(DataLoader(make(), 2, num_workers=1, persistent_workers=True))
    whole = [[0, 1], [2, 3], [4, 5], [6, 7]]
    pairs = zip(loader, loader, strict=True)
    assert [batch.tolist() for batch in next(pairs)] == [whole[0]] * 2
    with pytest.raises(DataError, match="goes on after a later one has begun"):
        next(pairs)
    assert ids(loader) == whole
    found = []
    for batch in loader:
        found.append(batch.tolist())
        if batch.tolist() == whole[-1]:
            # Nothing of the outer pass is left to miss.
            assert ids(loader) == whole
    assert found == whole


def test_a_loader_with_its_own_iteration_is_wrapped_on_one_rank() -> None:
    loader = prepared(OwnLoop(Numbers(7), 2))
    ends = [loader.end_of_dataloader for _ in loader]
    assert ends == [False, False, False, True]
    assert ids(loader) == [[100, 101], [102, 103], [104, 105], [106]]
    assert len(loader) == 4
    with pytest.raises(DataError, match="OwnLoop has its own __iter__"):
        prepared(OwnLoop(Numbers(7), 2), Seat(0, 2))


def test_a_stream_goes_on_by_reading_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    loader = prepared(DataLoader(PlainStream(10), 3))
    for number, _ in enumerate(loader, 1):
        if number == 2:
            break
    state = loader.state_dict()
    assert (state["samples"], state["batches"]) == (6, 2)
    resumed = prepared(DataLoader(PlainStream(10), 3))
    resumed.load_state_dict(state)
    with caplog.at_level(logging.INFO, "paceline.data.stream"):
        assert ids(resumed) == [[6, 7, 8], [9]]
    assert "reads and drops 2 batches" in caplog.text
    assert ids(resumed) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]


def test_a_stream_position_of_other_ranks_is_refused() -> None:
    loader = prepared(DataLoader(PlainStream(10), 3))
    state = {"version": 1, "epoch": 0, "samples": 6, "batches": 1, "seed": 7, "ranks": 2}
    with pytest.raises(DataError, match="saved by 2 ranks and is loaded by 1"):
        loader.load_state_dict(state)
    loader.load_state_dict({**state, "ended": True})
    assert ids(loader) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert loader.epoch == 2


def test_a_stream_position_of_other_workers_is_refused() -> None:
    loader = prepared(DataLoader(PlainStream(10), 3, num_workers=2))
    for _ in loader:
        state = loader.state_dict()
        break
    with pytest.raises(DataError, match="saved by 1 rank x 2 readers and is loaded by 1 rank"):
        prepared(DataLoader(PlainStream(10), 3)).load_state_dict(state)


def three_by_three() -> DataLoader[int]:
    return DataLoader(Numbers(40), batch_sampler=Buckets([3] * 13 + [1]))


@pytest.mark.parametrize("make", [shuffled, three_by_three])
def test_another_global_batch_within_an_epoch_is_refused(make: Any) -> None:
    loader = prepared(make())
    states = [loader.state_dict() for _ in loader]
    other = prepared(make(), Seat(0, 2))

    def resume(state: dict[str, Any]) -> None:
        other.load_state_dict(state)
        next(iter(other))

    if make is shuffled:
        with pytest.raises(
            DataError,
            match=r"of 3 samples = 1 rank x 3 samples and is .* 2 ranks x 3 samples",
        ):
            other.load_state_dict(states[4])
        resume(states[-1])
        assert other.epoch == 1
    else:
        # What a batch sampler of its own makes is known once it has run; its order may be uneven.
        resume(states[-1])
        with pytest.raises(DataError, match=r"varying size over 1 rank and is .* varying size over 2 ranks"):
            resume(states[4])
    before_that_was_saved = {key: value for key, value in states[4].items() if key not in ("rows", "readers", "ended")}
    resume(before_that_was_saved)


def test_the_end_of_an_epoch_is_the_end_for_other_layouts_too() -> None:
    loader = prepared(shuffled(14, 4, drop_last=True))
    states = [loader.state_dict() for _ in loader]
    assert states[-1]["samples"] == 12
    other = prepared(shuffled(14, 2, drop_last=True))
    other.load_state_dict(states[-1])
    whole = prepared(shuffled(14, 2, drop_last=True))
    ids(whole)
    assert ids(other) == ids(whole)


@pytest.mark.parametrize("split", [False, True])
def test_batches_of_different_sizes_keep_their_rounds(split: bool) -> None:
    def make(size: int) -> Any:
        loader = DataLoader(Numbers(20), batch_sampler=Buckets([2, 2, 4, 6, 4, 2]))
        return prepared(loader, Seat(0, size), even_batches=False, split_batches=split)

    loader, other = make(2), make(1)
    for _ in loader:
        state = loader.state_dict()
        break
    other.load_state_dict(state)
    if split:
        assert sum(map(len, ids(other))) == 20 - state["samples"]
    else:
        with pytest.raises(DataError, match=r"batches of varying size over 2 ranks .* varying size over 1 rank"):
            next(iter(other))


def validated(train: Any, valid: Any) -> Iterator[tuple[Any, Any]]:
    """Train, and look at two validation batches after each step."""
    for batch in train:
        for checked, other in enumerate(valid):
            yield batch.tolist(), other.tolist()
            if checked == 1:
                break
        yield batch.tolist(), None


@pytest.mark.parametrize(("events", "within"), [(7, True), (9, False)])
def test_two_loaders_go_on_together(events: int, within: bool) -> None:
    def make() -> tuple[Any, Any]:
        active = ActiveLoaders()
        return prepared(shuffled(), active=active), prepared(shuffled(20, 2), active=active)

    loaders = make()
    running = validated(*loaders)
    for _ in range(events):
        last = next(running)
    assert (last[1] is not None) == within
    states = [loader.state_dict() for loader in loaders]
    rest = list(running)
    again = make()
    for loader, state in zip(again, states, strict=True):
        loader.load_state_dict(state)
    assert (states[0]["samples"], states[1]["samples"]) == (9, 2 if within else 0)
    if within:
        assert ids(again[1])[0] == rest[0][1]
        assert ids(again[0]) == [batch for batch, other in rest if other is None][1:]
    else:
        assert list(validated(*again)) == rest


def test_an_empty_stream_raises_instead_of_doing_nothing() -> None:
    with pytest.raises(DataError, match="PlainStream has no batch"):
        ids(prepared(DataLoader(PlainStream(0), 3)))


@pytest.mark.parametrize("longer_first", [True, False])
def test_loaders_that_are_zipped_are_resumed_as_pairs(longer_first: bool) -> None:
    def make() -> list[Any]:
        active = ActiveLoaders()
        longer, shorter = prepared(shuffled(18), active=active), prepared(shuffled(12, 4), active=active)
        return [longer, shorter] if longer_first else [shorter, longer]

    def run(loaders: list[Any], pairs: int) -> tuple[list[Any], list[Any]]:
        found: list[Any] = []
        states: list[Any] = []
        while len(found) < pairs:
            for one, other in zip(*loaders, strict=False):
                found.append((one.tolist(), other.tolist()))
                states.append([loader.state_dict() for loader in loaders])
        return found, states

    whole, states = run(make(), 6)
    for place in range(5):
        loaders = make()
        for loader, state in zip(loaders, states[place], strict=True):
            loader.load_state_dict(state)
        assert run(loaders, 5 - place)[0][: 5 - place] == whole[place + 1 :], place
