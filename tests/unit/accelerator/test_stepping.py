"""Windows, optimizers and schedulers on a single process; ranks exchange nothing here."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LinearLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from paceline import Accelerator, GradientAccumulationPlugin, GradScalerKwargs
from paceline.accelerator.stepping import AcceleratedOptimizer, AcceleratedScheduler, is_scheduler
from paceline.errors import ConfigError, PrepareError, SteppingError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module", autouse=True)
def _optimizers_are_loaded() -> None:
    """The first step of a process makes torch set a variable of its own, which no test should be blamed for."""
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1).step()


class Stream(IterableDataset[Tensor]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Tensor]:
        for value in range(self.count):
            yield torch.tensor([float(value)])


def scalar(value: float = 0.0) -> nn.Linear:
    """y = w x, so that the gradient of y is the mean of x."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def loader(values: list[float], sized: bool = True) -> DataLoader[Any]:
    if not sized:
        return DataLoader(Stream(len(values)), batch_size=1)
    return DataLoader(TensorDataset(torch.tensor(values)[:, None]), batch_size=1)


def make(steps: int = 1, **arguments: Any) -> Accelerator:
    return Accelerator(cpu=True, gradient_accumulation_steps=steps, **arguments)


def gradients(accelerator: Accelerator, data: Any, passes: int = 1) -> list[float]:
    """The gradient at each step that was taken, with w fixed."""
    model: Any = scalar()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.0)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    found = []
    for _ in range(passes):
        for batch in data:
            x = batch[0] if isinstance(batch, list) else batch
            with accelerator.accumulate(model):
                accelerator.backward(model(x).mean())
                if accelerator.sync_gradients:
                    found.append(float(model.weight.grad))
                optimizer.step()
                optimizer.zero_grad()
    return found


# Windows


@pytest.mark.parametrize("sized", [True, False], ids=["sized", "unsized"])
def test_every_window_is_the_mean_of_what_was_in_it(sized: bool) -> None:
    data = loader([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0], sized)
    found = gradients(make(3), data, passes=2)
    # 0 1 2 | 3 4 5 | 6, and the next pass begins a new window.
    assert found == pytest.approx([1.0, 4.0, 6.0] * 2)


def test_a_window_may_go_on_over_the_end_of_a_pass() -> None:
    plugin = GradientAccumulationPlugin(num_steps=3, sync_with_dataloader=False)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    found = gradients(accelerator, loader([0.0, 1.0, 2.0, 3.0]), passes=2)
    # 0 1 2 | 3 0 1 | 2 3 and no end.
    assert found == pytest.approx([1.0, 4 / 3])


def test_without_a_prepared_loader_windows_are_full() -> None:
    accelerator = make(2)
    model: Any = accelerator.prepare(scalar())
    seen = []
    for _ in range(5):
        with accelerator.accumulate(model):
            seen.append(accelerator.sync_gradients)
    assert seen == [False, True, False, True, False]


def test_without_accumulate_every_backward_is_a_step() -> None:
    accelerator = make(1)
    model: Any = scalar()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=1.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    for step in range(3):
        accelerator.backward(model(torch.ones(1, 1)).sum())
        optimizer.step()
        optimizer.zero_grad()
        assert float(model.weight.detach()) == -(step + 1)


def test_two_losses_in_one_micro_batch_add_up() -> None:
    accelerator = make(2)
    model: Any = accelerator.prepare(scalar())
    for value in (1.0, 3.0):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.full((1, 1), value)).sum())
            accelerator.backward(model(torch.full((1, 1), 10.0)).sum())
    assert float(model.weight.grad) == pytest.approx((1 + 10 + 3 + 10) / 2)


def test_the_loss_itself_is_not_changed() -> None:
    accelerator = make(4)
    model: Any = accelerator.prepare(scalar(2.0))
    with accelerator.accumulate(model):
        loss = model(torch.ones(1, 1)).sum()
        accelerator.backward(loss)
    assert float(loss.detach()) == 2.0


def test_the_length_of_windows_may_change_between_them() -> None:
    accelerator = make(2)
    model: Any = accelerator.prepare(scalar())
    seen = []
    for length in (2, 2, 3, 3, 3, 1):
        accelerator.gradient_accumulation_steps = length
        with accelerator.accumulate(model):
            seen.append(accelerator.sync_gradients)
    assert seen == [False, True, False, False, True, True]
    assert accelerator.gradient_accumulation_steps == 1


def test_a_loop_left_in_mid_window_does_not_leak_into_the_next() -> None:
    accelerator = make(3)
    model: Any = scalar()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.0)
    data: Any = loader([5.0, 7.0, 9.0, 11.0])
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    with pytest.raises(KeyError), accelerator.accumulate(model):
        raise KeyError
    optimizer.zero_grad()
    assert accelerator.sync_gradients is False


def test_weights_over_a_window_give_the_weighted_mean() -> None:
    accelerator = make(3)
    model: Any = accelerator.prepare(scalar())
    sums, counts = [10.0, 2.0, 30.0], [5, 1, 4]
    for total, count in zip(sums, counts, strict=True):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.full((1, 1), total)).sum(), weight=count)
    assert float(model.weight.grad) == pytest.approx(sum(sums) / sum(counts))


def test_a_micro_batch_without_tokens_weighs_nothing() -> None:
    accelerator = make(3)
    model: Any = accelerator.prepare(scalar())
    for total, count in ((0.0, 0), (12.0, 3), (0.0, torch.tensor(0))):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.full((1, 1), total)).sum(), weight=count)
    assert float(model.weight.grad) == pytest.approx(4.0)


def test_a_window_without_any_token_gives_zero_not_nan() -> None:
    accelerator = make(2)
    model: Any = accelerator.prepare(scalar())
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.zeros(1, 1)).sum(), weight=0)
    assert float(model.weight.grad) == 0.0


# Several models and optimizers


class Both:
    """A GAN's two halves, with one optimizer each."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        one, two = scalar(1.0), scalar(1.0)
        optimizers = [torch.optim.SGD(m.parameters(), lr=1.0) for m in (one, two)]
        prepared: Any = accelerator.prepare(one, two, *optimizers)
        self.one, self.two, self.one_optimizer, self.two_optimizer = prepared

    def train(self, first: float, second: float) -> None:
        accelerator = self.accelerator
        with accelerator.accumulate(self.one, self.two):
            accelerator.backward(self.one(torch.full((1, 1), first)).sum())
            self.one_optimizer.step()
            self.one_optimizer.zero_grad()
            accelerator.backward(self.two(torch.full((1, 1), second)).sum())
            self.two_optimizer.step()
            self.two_optimizer.zero_grad()

    @property
    def weights(self) -> tuple[float, float]:
        return float(self.one.weight.detach()), float(self.two.weight.detach())


def test_two_optimizers_step_one_after_the_other() -> None:
    both = Both(make(1))
    both.train(1.0, 10.0)
    assert both.weights == (0.0, -9.0)
    both.train(2.0, 20.0)
    assert both.weights == (-2.0, -29.0)


def test_two_optimizers_share_a_window() -> None:
    both = Both(make(2))
    both.train(1.0, 10.0)
    assert both.weights == (1.0, 1.0)
    both.train(3.0, 30.0)
    # Means over two micro-batches, in the second optimizer too.
    assert both.weights == (-1.0, -19.0)
    both.train(1.0, 10.0)
    assert both.weights == (-1.0, -19.0)
    both.train(3.0, 30.0)
    assert both.weights == (-3.0, -39.0)


def test_windows_of_one_model_at_a_time() -> None:
    """The critic five times as often as the generator: each has windows of its own order."""
    accelerator = make(1)
    both = Both(accelerator)
    for turn in range(6):
        model, optimizer = (both.two, both.two_optimizer) if turn % 3 == 2 else (both.one, both.one_optimizer)
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(1, 1)).sum())
            optimizer.step()
            optimizer.zero_grad()
    assert both.weights == (1.0 - 4, 1.0 - 2)


def test_a_teacher_needs_no_optimizer() -> None:
    accelerator = make(1)
    teacher, student = scalar(3.0), scalar(0.0)
    optimizer: Any = torch.optim.SGD(student.parameters(), lr=0.1)
    teacher, student, optimizer = accelerator.prepare(teacher, student, optimizer)
    with torch.no_grad():
        wanted = teacher(torch.ones(1, 1))
    accelerator.backward((student(torch.ones(1, 1)) - wanted).square().sum())
    optimizer.step()
    assert float(student.weight.detach()) == pytest.approx(0.6)


# Optimizers


def test_inside_a_window_the_optimizer_rests() -> None:
    accelerator = make(2)
    model: Any = scalar()
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    steps = []
    model, optimizer = accelerator.prepare(model, inner)
    optimizer.register_step_post_hook(lambda *_: steps.append(accelerator.sync_gradients))
    for _ in range(4):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(1, 1)).sum())
            optimizer.step()
            optimizer.zero_grad()
    assert steps == [True, True]
    assert float(model.weight.detach()) == -2.0


def test_clipping_inside_a_window_is_refused() -> None:
    accelerator = make(2)
    model: Any = accelerator.prepare(scalar())
    with accelerator.accumulate(model):
        accelerator.backward(model(torch.ones(1, 1)).sum())
        with pytest.raises(SteppingError, match=r"clip_grad_norm_ was called in micro-batch 1 of a window of 2"):
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        with pytest.raises(SteppingError, match="clip_grad_value_"):
            accelerator.clip_grad_value_(model.parameters(), 1.0)
    with accelerator.accumulate(model):
        accelerator.backward(model(torch.full((1, 1), 9.0)).sum())
        assert float(accelerator.clip_grad_norm_(model.weight, 1.0)) == pytest.approx(5.0)
    assert float(model.weight.grad) == pytest.approx(1.0, abs=1e-5)


def test_saving_inside_a_window_is_refused_with_its_own_reason(tmp_path: Path) -> None:
    accelerator = make(2)
    model: Any = accelerator.prepare(scalar())
    with accelerator.accumulate(model):
        accelerator.backward(model(torch.ones(1, 1)).sum())
    with pytest.raises(SteppingError) as refused:
        accelerator.save_state(tmp_path / "state")
    assert str(refused.value) == (
        "save_state was called in micro-batch 1 of a window of 2. A training state holds no gradients, so those of the "
        "micro-batches so far would be lost. Call it under `if accelerator.sync_gradients:`"
    )


def test_a_model_is_no_parameter_to_clip() -> None:
    accelerator = make(1)
    model: Any = accelerator.prepare(scalar())
    accelerator.backward(model(torch.ones(1, 1)).sum())
    with pytest.raises(SteppingError, match=r"clip_grad_norm_ got a Linear.*clip_grad_norm_\(model.parameters\(\)"):
        accelerator.clip_grad_norm_(model, 1.0)


def test_a_loss_without_a_graph_is_named() -> None:
    accelerator = make(1)
    model: Any = accelerator.prepare(scalar())
    with torch.no_grad():
        loss = model(torch.ones(1, 1)).sum()
    with pytest.raises(SteppingError, match=r"depends on no trainable parameter.*no_grad"):
        accelerator.backward(loss)


def test_clipping_values() -> None:
    accelerator = make(1)
    model: Any = accelerator.prepare(nn.Linear(3, 1, bias=False))
    accelerator.backward(model(torch.tensor([[-9.0, 0.1, 9.0]])).sum())
    accelerator.clip_grad_value_(model.parameters(), 0.5)
    assert model.weight.grad.tolist() == [[-0.5, pytest.approx(0.1), 0.5]]


def test_a_wrapped_optimizer_is_an_optimizer() -> None:
    accelerator = make(1)
    model = nn.Linear(2, 2)
    inner = torch.optim.AdamW(model.parameters(), lr=0.1)
    optimizer = accelerator.prepare(model, inner)[1]
    assert isinstance(optimizer, AcceleratedOptimizer)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.optimizer is inner
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    assert optimizer.defaults is inner.defaults
    assert "AdamW" in repr(optimizer)
    assert accelerator.prepare(optimizer) is optimizer
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.5})
    assert [group["lr"] for group in inner.param_groups] == [0.1, 0.5]
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["lr"] = 0.7
    optimizer.load_state_dict(state)
    assert inner.param_groups[0]["lr"] == 0.7
    optimizer.train()
    optimizer.eval()


COPIED = """
import copy, pickle, torch
from paceline import Accelerator
accelerator = Accelerator(cpu=True)
model = torch.nn.Linear(2, 2)
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.3))
for back in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
    assert type(back) is torch.optim.AdamW and back.param_groups[0]["lr"] == 0.3
accelerator.backward(model(torch.ones(1, 2)).sum())
optimizer.step()
"""


def test_copying_an_optimizer_does_not_break_the_others() -> None:
    """In a process of its own: what breaks is the class."""
    done = subprocess.run([sys.executable, "-c", COPIED], capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr


def test_a_closure_is_called() -> None:
    accelerator = make(1)
    model: Any = scalar(5.0)
    optimizer: Any = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=10)
    model, optimizer = accelerator.prepare(model, optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = (model(torch.ones(1, 1)) - 2.0).square().sum()
        accelerator.backward(loss)
        return loss

    first = optimizer.step(closure)
    assert float(first.detach()) == pytest.approx(9.0)
    assert float(model.weight.detach()) == pytest.approx(2.0, abs=0.05)


def test_fp16_refuses_a_closure_and_a_step_without_backward() -> None:
    accelerator = make(1, mixed_precision="fp16")
    model: Any = scalar()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    with pytest.raises(SteppingError, match="before any loss was scaled"):
        optimizer.step()
    accelerator.backward(model(torch.ones(1, 1)).float().sum())
    with pytest.raises(SteppingError, match="closure"):
        optimizer.step(lambda: None)


def test_fp16_gradients_are_unscaled_once() -> None:
    accelerator = make(1, mixed_precision="fp16", kwargs_handlers=[GradScalerKwargs(init_scale=256.0)])
    model: Any = scalar()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    accelerator.backward(model(torch.ones(1, 1)).float().sum())
    assert float(model.weight.grad) == 256.0
    accelerator.unscale_gradients()
    accelerator.unscale_gradients(optimizer)
    assert float(accelerator.clip_grad_norm_(model.parameters(), 10.0)) == pytest.approx(1.0)
    optimizer.step()
    assert float(model.weight.detach()) == pytest.approx(-1.0)
    assert not accelerator.optimizer_step_was_skipped


# Schedulers


@pytest.mark.parametrize("when", ["with the rest", "made after", "before its optimizer", "on its own"])
def test_a_schedule_moves_with_the_steps_taken(when: str) -> None:
    accelerator = make(2)
    model: Any = scalar()
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer: Any
    scheduler: Any
    match when:
        case "with the rest":
            scheduler = LambdaLR(inner, lambda step: 0.5**step)
            scheduler, model, optimizer = accelerator.prepare(scheduler, model, inner)
        case "made after":
            model, optimizer = accelerator.prepare(model, inner)
            scheduler = accelerator.prepare(LambdaLR(optimizer, lambda step: 0.5**step))
        case "before its optimizer":
            scheduler = accelerator.prepare(LambdaLR(inner, lambda step: 0.5**step))
            model, optimizer = accelerator.prepare(model, inner)
        case _:
            scheduler = LambdaLR(inner, lambda step: 0.5**step)
            model, optimizer = accelerator.prepare(model, inner)
            scheduler = accelerator.prepare_scheduler(scheduler)
    assert isinstance(scheduler, AcceleratedScheduler)
    rates = []
    for _ in range(6):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(1, 1)).sum())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        rates.append(scheduler.get_last_lr()[0])
    assert rates == [1.0, 0.5, 0.5, 0.25, 0.25, 0.125]
    assert inner.param_groups[0]["lr"] == 0.125
    assert scheduler.last_epoch == 3
    assert accelerator.prepare(scheduler) is scheduler


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_schedule_may_move_on_every_call() -> None:
    accelerator = make(2, step_scheduler_with_optimizer=False)
    model: Any = scalar()
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    model, optimizer, scheduler = accelerator.prepare(model, inner, LambdaLR(inner, lambda step: 0.5**step))
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(1, 1)).sum())
            optimizer.step()
            scheduler.step()
    assert scheduler.get_last_lr() == [0.25]


def skip_one_of_two(accelerator: Accelerator) -> tuple[list[float], list[float]]:
    """fp16 with two optimizers; the second one's gradient overflows."""
    one, two = scalar(1.0), scalar(1.0)
    inner = [torch.optim.SGD(m.parameters(), lr=1.0) for m in (one, two)]
    made: Any = accelerator.prepare(one, two, *inner, *(LinearLR(o, 1.0, 0.0, 10) for o in inner))
    one, two, one_optimizer, two_optimizer, one_scheduler, two_scheduler = made
    accelerator.backward(one(torch.ones(1, 1)).float().sum())
    accelerator.backward(two(torch.ones(1, 1)).float().sum() * float("inf"))
    for optimizer in (one_optimizer, two_optimizer):
        optimizer.step()
    for scheduler in (one_scheduler, two_scheduler):
        scheduler.step()
    return [float(one.weight.detach()), float(two.weight.detach())], [
        *one_scheduler.get_last_lr(),
        *two_scheduler.get_last_lr(),
    ]


def test_a_skipped_step_holds_back_its_own_schedule_only() -> None:
    accelerator = make(1, mixed_precision="fp16", kwargs_handlers=[GradScalerKwargs(init_scale=8.0)])
    weights, rates = skip_one_of_two(accelerator)
    assert weights == [0.0, 1.0]
    assert rates == pytest.approx([0.9, 1.0])
    assert accelerator.optimizer_step_was_skipped


def test_a_plateau_schedule_gets_its_metric() -> None:
    accelerator = make(1)
    model: Any = scalar()
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    plateau = ReduceLROnPlateau(inner, patience=0, factor=0.1)
    model, optimizer, scheduler = accelerator.prepare(model, inner, plateau)
    accelerator.backward(model(torch.ones(1, 1)).sum())
    optimizer.step()
    for metric in (1.0, 1.0):
        scheduler.step(metric)
    assert scheduler.get_last_lr() == pytest.approx([0.1])


def test_a_schedule_of_ones_own() -> None:
    class Mine:
        def __init__(self) -> None:
            self.moved = 0

        def step(self) -> None:
            self.moved += 1

        def get_last_lr(self) -> list[float]:
            return [0.1]

        def state_dict(self) -> dict[str, int]:
            return {"moved": self.moved}

    mine = Mine()
    assert is_scheduler(mine)
    accelerator = make(1)
    model: Any = scalar()
    model, optimizer, scheduler = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0), mine)
    accelerator.backward(model(torch.ones(1, 1)).sum())
    optimizer.step()
    scheduler.step()
    assert scheduler.state_dict() == {"moved": 1}


def test_what_is_no_schedule() -> None:
    assert not is_scheduler(object())
    assert not is_scheduler(nn.Linear(1, 1))
    assert not is_scheduler(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))


def test_a_schedules_state_travels() -> None:
    accelerator = make(1)
    inner = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler: Any = accelerator.prepare(LinearLR(inner, 1.0, 0.0, 10))
    state = copy.deepcopy(scheduler.state_dict()) | {"last_epoch": 4, "_last_lr": [0.6]}
    scheduler.load_state_dict(state)
    assert (scheduler.last_epoch, scheduler.get_last_lr()) == (4, [0.6])
    assert "LinearLR" in repr(scheduler)


# What contradicts itself


def test_two_numbers_of_steps() -> None:
    with pytest.raises(ConfigError, match="gradient_accumulation_plugin"):
        make(2, gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=3))
    alike = make(3, gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=3))
    assert alike.gradient_accumulation_steps == 3


@pytest.mark.parametrize("steps", [0, -1])
def test_windows_hold_something(steps: int) -> None:
    with pytest.raises(ConfigError, match="gradient_accumulation_steps"):
        make(steps)


def test_accumulate_before_prepare() -> None:
    accelerator = make(2)
    model = accelerator.prepare(scalar())
    with accelerator.accumulate(model):
        assert not accelerator.sync_gradients


def test_flags_that_do_not_fit_the_arguments() -> None:
    with pytest.raises(PrepareError, match="2 entries for 1 arguments"):
        make(1).prepare(scalar(), device_placement=[True, False])
