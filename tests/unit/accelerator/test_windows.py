"""Which loader ends a window, where a loop draws from several; and which losses a window takes."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from paceline import Accelerator, GradScalerKwargs
from paceline.errors import PrepareError, SteppingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

WINDOW = 4


@pytest.fixture(scope="module", autouse=True)
def _optimizers_are_loaded() -> None:
    """The first step of a process makes torch set a variable of its own, which no test should be blamed for."""
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1).step()


def loader(count: int) -> Any:
    return DataLoader(TensorDataset(torch.arange(float(count))[:, None]), batch_size=1)


def cycle(data: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from data


class Endless:
    """An iterator that begins its loader again, as many scripts write it."""

    def __init__(self, data: Iterable[Any]) -> None:
        self.data = data
        self.iterator = iter(data)

    def __iter__(self) -> Endless:
        return self

    def __next__(self) -> Any:
        try:
            return next(self.iterator)
        except StopIteration:
            self.iterator = iter(self.data)
            return next(self.iterator)


class Run:
    """A model whose weight never moves, and where its windows end."""

    def __init__(self, *lengths: int, window: int = WINDOW, **arguments: Any) -> None:
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=window, **arguments)
        model: Any = nn.Linear(1, 1, bias=False)
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.0)
        self.model, self.optimizer, *self.loaders = self.accelerator.prepare(
            model, optimizer, *(loader(length) for length in lengths)
        )
        # Micro-batches of each window, and what is left open.
        self.windows = [0]
        self.gradients: list[float] = []

    def micro_batch(self, x: Any = 1.0) -> None:
        with self.accelerator.accumulate(self.model):
            x = torch.as_tensor(x).reshape(1, 1)
            self.accelerator.backward(self.model(x).mean())
            self.windows[-1] += 1
            self.optimizer.step()
            if self.accelerator.sync_gradients:
                self.gradients.append(float(self.model.weight.grad))
                self.windows.append(0)
            self.optimizer.zero_grad()

    def over(self, batches: Iterable[Any]) -> list[int]:
        for both in batches:
            self.micro_batch(both[0][0])
        return self.closed()

    def closed(self) -> list[int]:
        """The windows since the last call; the last one must be closed."""
        *found, still_open = self.windows
        assert still_open == 0, f"{still_open} micro-batches are in no step"
        self.windows = [0]
        return found


ONE_OF_TWO: dict[str, Callable[[Any, Any], Iterable[Any]]] = {
    "zip(a, cycle(b))": lambda a, b: zip(a, cycle(b), strict=False),
    "zip(cycle(b), a)": lambda a, b: zip(cycle(b), a, strict=False),
    "zip(a, itertools.cycle(b))": lambda a, b: zip(a, itertools.cycle(b), strict=False),
    "zip(itertools.cycle(b), a)": lambda a, b: zip(itertools.cycle(b), a, strict=False),
    "zip(a, Endless(b))": lambda a, b: zip(a, Endless(b), strict=False),
    "zip(Endless(b), a)": lambda a, b: zip(Endless(b), a, strict=False),
    "tqdm(zip(cycle(b), a))": lambda a, b: tqdm(zip(cycle(b), a, strict=False), disable=True),
    "zip(tqdm(a), cycle(b))": lambda a, b: zip(tqdm(a, disable=True), cycle(b), strict=False),
}  # fmt: skip


@pytest.mark.parametrize("inner", [1, 3, 4, 20])
@pytest.mark.parametrize("how", ONE_OF_TWO)
def test_a_window_ends_with_the_loop_and_not_with_a_loader_inside_it(how: str, inner: int) -> None:
    run = Run(10, inner)
    for _ in range(2):
        assert run.over(ONE_OF_TWO[how](*run.loaders)) == [4, 4, 2]


@pytest.mark.parametrize("lengths", [(10, 6), (6, 10), (6, 6)])
def test_zipped_loaders_end_with_the_shortest(lengths: tuple[int, int]) -> None:
    run = Run(*lengths)
    for _ in range(2):
        assert run.over(zip(*run.loaders, strict=False)) == [4, 2]


def test_batches_drawn_by_next_inside_the_loop() -> None:
    """The iterator lives on over the loop's passes, as in semi-supervised training."""
    run = Run(10, 7)
    labelled, unlabelled = run.loaders
    iterator = iter(unlabelled)
    for _ in range(3):
        for (x,) in labelled:
            try:
                next(iterator)
            except StopIteration:
                iterator = iter(unlabelled)
                next(iterator)
            run.micro_batch(x)
        assert run.closed() == [4, 4, 2]


def test_an_endless_iterator_that_lives_on() -> None:
    run = Run(10, 7)
    labelled, unlabelled = run.loaders
    endless = cycle(unlabelled)
    for _ in range(3):
        for (x,) in labelled:
            next(endless)
            run.micro_batch(x)
        assert run.closed() == [4, 4, 2]


def test_an_evaluation_inside_a_window() -> None:
    run = Run(10, 3)
    train, evaluation = run.loaders
    for index, (x,) in enumerate(train):
        run.micro_batch(x)
        if index in (1, 5, 9):
            assert sum(1 for _ in evaluation) == 3
    assert run.closed() == [4, 4, 2]


def test_a_half_read_evaluation() -> None:
    run = Run(10, 3)
    train, evaluation = run.loaders
    some = iter(evaluation)
    next(some)
    for _ in range(2):
        for index, (x,) in enumerate(train):
            if index == 4:
                next(some, None)
            run.micro_batch(x)
        assert run.closed() == [4, 4, 2]


def test_a_loop_inside_a_loop_ends_its_windows() -> None:
    run = Run(3, 6)
    outer, inner = run.loaders
    for _ in outer:
        for (x,) in inner:
            run.micro_batch(x)
        assert run.closed() == [4, 2]


def test_loops_one_after_the_other() -> None:
    run = Run(5, 3)
    assert run.over(itertools.chain(*run.loaders)) == [4, 1, 3]


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_several_micro_batches_of_one_batch(parts: int) -> None:
    """The last batch makes as many as the others, not a window of each part."""
    run = Run(3)
    (train,) = run.loaders
    for _ in range(2):
        for (x,) in train:
            for _ in range(parts):
                run.micro_batch(x)
        total = 3 * parts
        assert run.closed() == [4] * (total // 4) + ([total % 4] if total % 4 else [])


def test_a_loop_that_is_left_goes_on_with_its_window() -> None:
    run = Run(10)
    (train,) = run.loaders
    for index, (x,) in enumerate(train):
        run.micro_batch(x)
        if index == 5:
            break
    assert run.windows == [4, 2]
    for (x,) in train:
        run.micro_batch(x)
    # What was gathered belongs to the next step: 4 | 2 + 2 | 4 | 4.
    assert run.closed() == [4, 4, 4, 4]


def test_gradients_stay_true_means_where_the_length_was_guessed() -> None:
    run = Run(10, 3)
    a, b = run.loaders
    assert run.over(zip(a, itertools.cycle(b), strict=False)) == [4, 4, 2]
    assert run.gradients == pytest.approx([1.5, 5.5, 8.5])


# Losses


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_loss_of_several_values_is_refused(weighted: bool, window: int, precision: str) -> None:
    run = Run(window=window, mixed_precision=precision)
    more: dict[str, Any] = {"weight": 4} if weighted else {}
    with (
        run.accelerator.accumulate(run.model),
        pytest.raises(SteppingError, match=r"shape \[4\].*only for scalar outputs.*loss.mean\(\)"),
    ):
        run.accelerator.backward(run.model(torch.ones(4, 1))[:, 0], **more)
    assert run.model.weight.grad is None


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_one_value_of_any_shape_is_a_loss(weighted: bool, window: int, shape: tuple[int, ...]) -> None:
    run = Run(window=window)
    weight: Any = torch.tensor([2.0]) if weighted else None
    for x in (1.0, 3.0)[:window]:
        with run.accelerator.accumulate(run.model):
            loss = run.model(torch.tensor([[x]])).reshape(shape)
            run.accelerator.backward(loss * 2 if weighted else loss, weight=weight)
    assert float(run.model.weight.grad) == pytest.approx(1.0 if window == 1 else 2.0)


@pytest.mark.parametrize(
    ("loss", "text"),
    [(1.0, "got a float"), ({"loss": 1.0}, "got a dict"), (torch.ones((), dtype=torch.complex64), "complex64")],
)
def test_what_is_no_loss(loss: Any, text: str) -> None:
    with pytest.raises(SteppingError, match=text):
        Run(window=2).accelerator.backward(loss)


def test_a_weight_is_one_number() -> None:
    run = Run(window=2)
    with pytest.raises(SteppingError, match=r"weight of shape \[3\].*weight.sum\(\)"):
        run.accelerator.backward(run.model(torch.ones(1, 1)).sum(), weight=torch.ones(3))


@pytest.mark.parametrize("window", [1, 2])
def test_a_gradient_weighs_the_values_of_a_loss(window: int) -> None:
    run = Run(window=window)
    for _ in range(window):
        with run.accelerator.accumulate(run.model):
            losses = run.model(torch.tensor([[1.0], [2.0]]))[:, 0]
            run.accelerator.backward(losses, gradient=torch.tensor([10.0, 1.0]))
    assert float(run.model.weight.grad) == pytest.approx(12.0)
    with pytest.raises(SteppingError, match=r"gradient of shape \[1\]"):
        run.accelerator.backward(run.model(torch.ones(2, 1))[:, 0], gradient=torch.ones(1))


# Optimizers of one window


def test_an_optimizer_that_no_window_would_ever_step() -> None:
    """`accumulate` once for each model: the discriminator would always be in the first half of a window."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    one, two = nn.Linear(1, 1), nn.Linear(1, 1)
    prepared: Any = accelerator.prepare(
        one, two, torch.optim.SGD(one.parameters(), lr=1.0), torch.optim.AdamW(two.parameters()), loader(8)
    )
    one, two, first, second, data = prepared

    def train() -> None:
        for (x,) in data:
            for model, optimizer in ((one, first), (two, second)):
                with accelerator.accumulate(model):
                    accelerator.backward(model(x).sum())
                    optimizer.step()
                    optimizer.zero_grad()

    with pytest.raises(SteppingError, match=r"SGD.step\(\) was called inside windows of 2 micro-batches and never"):
        train()


# Precision


def test_fp16_weights_say_what_to_do() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).half())
    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    with pytest.raises(PrepareError, match=r"2 of the optimizer's 4 parameters are fp16 \(1.weight, 1.bias\)"):
        accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_an_optimizer_of_fp16_weights_before_its_model() -> None:
    model = nn.Linear(2, 3).half()
    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    with pytest.raises(PrepareError, match=r"are fp16 \(one of shape \(3, 2\), one of shape \(3,\)\)"):
        accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))


def test_fp16_weights_that_nobody_trains_may_stay() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    accelerator.prepare(nn.Linear(2, 2).half())
    model = nn.Sequential(nn.Linear(2, 2).half().requires_grad_(False), nn.Linear(2, 2))
    accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))


# Schedules


def overflowing(scale: float = 8.0) -> Run:
    return Run(window=1, mixed_precision="fp16", kwargs_handlers=[GradScalerKwargs(init_scale=scale)])


def test_a_metric_is_not_dropped_after_a_skipped_step() -> None:
    run = overflowing()
    plateau: Any = run.accelerator.prepare(ReduceLROnPlateau(run.optimizer.optimizer, patience=0, factor=0.1))
    for metric in (3.0, 3.0, 3.0):
        run.micro_batch(float("inf"))
        assert run.accelerator.optimizer_step_was_skipped
        plateau.step(metric)
    assert plateau.scheduler.last_epoch == 3


def test_a_metric_is_not_dropped_inside_a_window() -> None:
    run = Run()
    run.optimizer.optimizer.param_groups[0]["lr"] = 1.0
    plateau: Any = run.accelerator.prepare(ReduceLROnPlateau(run.optimizer.optimizer, patience=0, factor=0.1))
    run.micro_batch()
    plateau.step(1.0)
    plateau.step(metrics=1.0)
    assert plateau.get_last_lr() == pytest.approx([0.1])


@pytest.mark.filterwarnings("ignore:.*EPOCH|.*epoch parameter.*")
def test_an_epoch_is_not_dropped_either() -> None:
    run = Run()
    schedule: Any = run.accelerator.prepare(StepLR(run.optimizer.optimizer, 1))
    for _ in range(WINDOW + 1):
        run.micro_batch()
    schedule.step(7)
    assert schedule.last_epoch == 7


def test_a_schedule_of_passes_moves_though_the_last_step_was_skipped() -> None:
    run = overflowing()
    schedule: Any = run.accelerator.prepare(StepLR(run.optimizer.optimizer, 1))
    for _ in range(2):
        for x in (1.0, 1.0, float("inf")):
            run.micro_batch(x)
        schedule.step()
    assert schedule.last_epoch == 2


def test_a_schedule_of_passes_moves_though_a_window_is_open() -> None:
    run = Run(10)
    schedule: Any = run.accelerator.prepare(StepLR(run.optimizer.optimizer, 1))
    for index, (x,) in enumerate(run.loaders[0]):
        run.micro_batch(x)
        if index == 8:
            break
    assert not run.accelerator.sync_gradients
    schedule.step()
    assert schedule.last_epoch == 1
    schedule.step()
    assert schedule.last_epoch == 1


def test_a_window_that_was_left_open_ends_with_what_was_prepared() -> None:
    def weights_after(*, leaves_one_open: bool) -> torch.Tensor:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        if leaves_one_open:
            other = accelerator.prepare(nn.Linear(2, 1))
            with accelerator.accumulate(other):
                accelerator.backward(other(torch.ones(3, 2)).mean())
            accelerator.free_memory()
        torch.manual_seed(0)
        module = nn.Linear(2, 1)
        model, optimizer = accelerator.prepare(module, torch.optim.SGD(module.parameters(), lr=0.1))
        for value in (1.0, 2.0, 3.0, 4.0):
            with accelerator.accumulate(model):
                accelerator.backward(model(torch.full((3, 2), value)).square().mean())
                optimizer.step()
                optimizer.zero_grad()
        return module.weight.detach().clone()

    assert torch.equal(weights_after(leaves_one_open=True), weights_after(leaves_one_open=False))
