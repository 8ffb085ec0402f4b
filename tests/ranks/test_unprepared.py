"""What a script trains with and never prepared: an error where it can only be a mistake, else one warning."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

from paceline.errors import PacelineError
from tests.support.engines import make, with_deepspeed
from tests.support.ranks import run_on_ranks
from tests.support.warned import warnings_of

LAYOUTS = [(1, "single"), (2, "ddp"), (2, "fsdp")]
ENGINES = [*LAYOUTS, *with_deepspeed([(2, "zero2")])]
SAMPLES = 32


def loader(**more: Any) -> Any:
    return DataLoader(TensorDataset(torch.arange(float(SAMPLES))[:, None] / SAMPLES), batch_size=2, **more)


def outcome(train: Any) -> list[str]:
    """The error that a training ended with, or what it warned of."""
    with warnings_of() as texts:
        try:
            train()
        except PacelineError as error:
            return [f"{type(error).__name__}: {error}"]
    return texts


def steps(accelerator: Any, model: Any, optimizer: Any, data: Any, *, directly: bool = False) -> None:
    for (x,) in data:
        with accelerator.accumulate(model):
            loss = model(x).mean()
            if directly:
                loss.backward()
            else:
                accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()


# An optimizer


def unprepared_optimizer(strategy: str, window: int, precision: str, late: bool) -> list[str]:
    accelerator = make(strategy, gradient_accumulation_steps=window, mixed_precision=precision)
    model: Any = nn.Linear(1, 1)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    model, data = accelerator.prepare(model, loader())
    if late:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return outcome(lambda: steps(accelerator, model, optimizer, data))


@pytest.mark.parametrize(
    ("window", "precision", "text"),
    [(1, "no", ""), (2, "no", "in the middle of a window of 2 micro-batches"), (1, "fp16", "the loss scale, 65536")],
)
@pytest.mark.parametrize("late", [False, True], ids=["made before", "made after"])
@pytest.mark.parametrize(("ranks", "strategy"), LAYOUTS)
def test_an_unprepared_optimizer(ranks: int, strategy: str, late: bool, window: int, precision: str, text: str) -> None:
    first, *others = run_on_ranks(ranks, unprepared_optimizer, strategy, window, precision, late)
    if strategy == "fsdp" and not late:
        text = "FSDP has replaced the parameters that it updates, so it trains nothing"
    if text:
        assert all(
            text in found[0] and "accelerator.prepare(model, optimizer)" in found[0] for found in (first, *others)
        )
    else:
        [said] = first
        assert "SGD, which was never passed to prepare, was stepped at" in said
        assert "test_unprepared.py" in said
        assert "(optimizer.step())" in said
        assert others in ([], [[]])


def second_optimizer(strategy: str) -> list[str]:
    """One half of the model is in a prepared optimizer, the other in one that nobody prepared."""
    accelerator = make(strategy, gradient_accumulation_steps=2)
    model: Any = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    one: Any = torch.optim.SGD(model[0].parameters(), lr=0.1)
    two: Any = torch.optim.AdamW(model[1].parameters(), lr=0.1)
    model, one, data = accelerator.prepare(model, one, loader())

    class Both:
        def step(self) -> None:
            one.step()
            two.step()

        def zero_grad(self) -> None:
            one.zero_grad()

    return outcome(lambda: steps(accelerator, model, Both(), data))


@pytest.mark.parametrize(("ranks", "strategy"), ENGINES)
def test_one_of_two_optimizers_is_unprepared(ranks: int, strategy: str) -> None:
    for [said] in run_on_ranks(ranks, second_optimizer, strategy):
        assert "never passed to prepare" in said or "in no optimizer" in said


def wrapping_optimizer(strategy: str) -> list[str]:
    """An optimizer that steps another one inside is prepared as a whole."""

    class Careful(torch.optim.Optimizer):
        def __init__(self, base: torch.optim.Optimizer) -> None:
            self.base = base
            super().__init__(base.param_groups, {})
            self.param_groups = base.param_groups

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.base.step()

    accelerator = make(strategy, gradient_accumulation_steps=2)
    model: Any = nn.Linear(1, 1)
    optimizer: Any = Careful(torch.optim.SGD(model.parameters(), lr=0.1))
    model, optimizer, data = accelerator.prepare(model, optimizer, loader())
    return outcome(lambda: steps(accelerator, model, optimizer, data))


@pytest.mark.parametrize(("ranks", "strategy"), LAYOUTS[:2])
def test_an_optimizer_inside_a_prepared_one(ranks: int, strategy: str) -> None:
    assert run_on_ranks(ranks, wrapping_optimizer, strategy) == [[]] * ranks


# backward


def direct_backward(strategy: str, window: int) -> list[str]:
    accelerator = make(strategy, gradient_accumulation_steps=window)
    model: Any = nn.Linear(1, 1)
    model, optimizer, data = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader())
    return outcome(lambda: steps(accelerator, model, optimizer, data, directly=True))


@pytest.mark.parametrize(("ranks", "strategy"), ENGINES)
def test_backward_of_the_loss_itself(ranks: int, strategy: str) -> None:
    for [said] in run_on_ranks(ranks, direct_backward, strategy, 2):
        assert "a window of 2 micro-batches, in which accelerator.backward() was not called" in said
        assert "Call accelerator.backward(loss)" in said
    # Without accumulation it is the same thing.
    assert run_on_ranks(ranks, direct_backward, strategy, 1) == [[]] * ranks


# A loader


def unprepared_loader(strategy: str, kind: str) -> list[str]:
    accelerator = make(strategy)
    model: Any = nn.Linear(1, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    data = loader(shuffle=kind == "shuffled")
    if kind == "forgotten":
        accelerator.prepare(data)
    if kind == "sampler":
        size, rank = accelerator.num_processes, accelerator.process_index
        data = loader(sampler=DistributedSampler(data.dataset, num_replicas=size, rank=rank))
    if kind == "part":
        part = Subset(data.dataset, range(accelerator.process_index, SAMPLES, accelerator.num_processes))
        data = DataLoader(part, batch_size=2)
    return outcome(lambda: steps(accelerator, model, optimizer, data))


@pytest.mark.parametrize("kind", ["plain", "shuffled", "forgotten", "sampler", "part"])
@pytest.mark.parametrize(("ranks", "strategy"), ENGINES)
def test_an_unprepared_loader(ranks: int, strategy: str, kind: str) -> None:
    first, *others = run_on_ranks(ranks, unprepared_loader, strategy, kind)
    assert others in ([], [[]])
    if ranks == 1 or kind in ("sampler", "part"):
        assert first == []
        return
    [said] = first
    assert "A DataLoader over TensorDataset, which was never passed to prepare" in said
    assert f"each of the 2 ranks iterates over all of its {SAMPLES} samples" in said
    assert "(optimizer.step())" in said


def only_the_model(strategy: str, with_schedule: bool) -> list[str]:
    accelerator = make(strategy)
    model: Any = nn.Linear(1, 1)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = CosineAnnealingLR(optimizer, SAMPLES) if with_schedule else None
    model = accelerator.prepare(model)
    texts = outcome(lambda: steps(accelerator, model, optimizer, loader()))
    assert (schedule is not None) == with_schedule, "it is alive while the model is trained"
    return texts


@pytest.mark.parametrize(("with_schedule", "more"), [(False, ""), (True, ", scheduler")])
def test_all_that_was_left_out_is_in_one_warning(with_schedule: bool, more: str) -> None:
    first, second = run_on_ranks(2, only_the_model, "ddp", with_schedule)
    assert second == []
    [said] = first
    assert "SGD, which was never passed to prepare, was stepped at" in said
    assert "A DataLoader over TensorDataset was not prepared either" in said
    assert f"each of the 2 ranks iterates over all of its {SAMPLES} samples" in said
    assert ("Nor was CosineAnnealingLR, its schedule" in said) == with_schedule
    line = f"model, optimizer, loader{more}"
    assert said.endswith(f"Write {line} = accelerator.prepare({line})")


def test_the_error_about_an_optimizer_has_the_whole_line_too() -> None:
    for [said] in run_on_ranks(2, only_the_model, "fsdp", False):
        assert "so it trains nothing" in said
        assert "Write model, optimizer, loader = accelerator.prepare(model, optimizer, loader)" in said


# Nothing, or no model


def nothing(what: str, strategy: str = "ddp") -> list[str]:
    accelerator = make(strategy)
    model: Any = nn.Linear(1, 1)
    if what == "wrapped by hand":
        model = DistributedDataParallel(model)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    data = loader()
    if what == "no model":
        optimizer, data = accelerator.prepare(optimizer, data)
    if what == "wrapped by hand":
        data = accelerator.prepare(data)

    def train() -> None:
        for (x,) in data:
            accelerator.backward(model(x).mean())
            optimizer.step()
            optimizer.zero_grad()

    return outcome(train)


def test_nothing_was_prepared() -> None:
    first, second = run_on_ranks(2, nothing, "nothing")
    [said] = first
    assert "SGD, which was never passed to prepare, was stepped at" in said
    assert "each of the 2 ranks trains a copy of its own" in said
    assert second == []
    assert run_on_ranks(1, nothing, "nothing", "single") == [[]]


def test_an_optimizer_without_its_model() -> None:
    for [said] in run_on_ranks(2, nothing, "no model"):
        assert "An optimizer was passed to prepare, but no model" in said


def test_a_model_that_is_wrapped_by_hand() -> None:
    assert run_on_ranks(2, nothing, "wrapped by hand") == [[], []]


def beside() -> list[str]:
    """A small model of a rank's own, next to one that all train together."""
    accelerator = make("ddp", gradient_accumulation_steps=2)
    model: Any = nn.Linear(1, 1)
    model, optimizer, data = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader())
    own = nn.Linear(1, 1)
    probe = torch.optim.SGD(own.parameters(), lr=0.1)

    def train() -> None:
        own(torch.ones(1, 1)).sum().backward()
        probe.step()
        steps(accelerator, model, optimizer, data)

    return outcome(train)


def test_a_model_of_a_ranks_own() -> None:
    assert run_on_ranks(2, beside) == [[], []]


# The length of a schedule


def scheduled(strategy: str, window: int, passes: int, factor: str, more: int = 0) -> list[str]:
    """Train `passes` passes under a schedule that was counted in one way or another."""
    accelerator = make(strategy, gradient_accumulation_steps=window)
    data: Any = loader()
    before = len(data)
    data = accelerator.prepare(data)
    ranks = accelerator.num_processes
    total = {
        "right": passes * math.ceil(len(data) / window),
        "before": passes * math.ceil(before / window),
        "times ranks": passes * math.ceil(len(data) / window) * ranks,
        "batches": passes * len(data),
    }[factor]
    model: Any = nn.Linear(1, 1)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, CosineAnnealingLR(optimizer, total))

    def train() -> None:
        for _ in range(passes + more):
            for (x,) in data:
                with accelerator.accumulate(model):
                    accelerator.backward(model(x).mean())
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
        accelerator.free_memory()

    return outcome(train)


@pytest.mark.parametrize(("ranks", "strategy"), ENGINES)
def test_a_schedule_that_was_counted_before_prepare(ranks: int, strategy: str) -> None:
    first, *others = run_on_ranks(ranks, scheduled, strategy, 1, 2, "before")
    assert others in ([], [[]])
    if ranks == 1:
        assert first == []
        return
    [said] = first
    assert "CosineAnnealingLR was made for 32 optimizer steps, and the training took 16" in said
    assert "learning rate ended at 0.05" in said
    assert "make the schedule for 2 * len(loader) = 16 steps" in said


@pytest.mark.parametrize(
    ("ranks", "strategy", "window", "factor", "text"),
    [
        (2, "ddp", 1, "right", ""),
        (2, "ddp", 2, "right", ""),
        (2, "ddp", 1, "times ranks", "before prepare"),
        (2, "ddp", 2, "before", "before prepare"),
        (2, "ddp", 2, "batches", "before prepare"),
        (1, "single", 2, "batches", "it counts batches, and a step takes 2 of them"),
        (1, "single", 2, "right", ""),
    ],
)
def test_other_counts(ranks: int, strategy: str, window: int, factor: str, text: str) -> None:
    first = run_on_ranks(ranks, scheduled, strategy, window, 2, factor)[0]
    assert len(first) == bool(text)
    assert not text or text in first[0]


def test_a_schedule_of_as_many_steps_as_were_taken_is_right_however_it_was_counted() -> None:
    """Twice as many passes on two ranks take what looked like too many steps in between."""
    assert run_on_ranks(2, scheduled, "ddp", 1, 2, "before", 2)[0] == []


def test_hooks_are_taken_off() -> None:
    from torch.optim.optimizer import _global_optimizer_pre_hooks as hooks

    before = set(hooks)
    accelerator = make("single")
    (key,) = set(hooks) - before
    model: Any = nn.Linear(1, 1)
    model, optimizer, data = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader())
    assert key in hooks
    steps(accelerator, model, optimizer, data)
    assert key not in hooks


# Everything is prepared


def prepared_under_auto() -> list[str]:
    def train() -> None:
        # The planner takes a step of a small model of its own to see what the optimizer keeps.
        accelerator = make("auto")
        model: Any = nn.Linear(1, 1)
        model, optimizer, data = accelerator.prepare(model, torch.optim.AdamW(model.parameters()), loader())
        steps(accelerator, model, optimizer, data)

    return outcome(train)


def test_the_planner_is_not_taken_for_the_script() -> None:
    assert run_on_ranks(2, prepared_under_auto) == [[], []]
