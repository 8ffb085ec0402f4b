"""A schedule of torch beside an optimizer that only DeepSpeed's JSON describes: it moves what DeepSpeed built."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, LinearLR, OneCycleLR, ReduceLROnPlateau, SequentialLR, StepLR

from paceline import Accelerator, DeepSpeedPlugin, DummyOptim
from paceline.errors import PrepareError
from tests.support.engines import needs_deepspeed
from tests.support.models import TinyTransformer, make_tokens, token_losses
from tests.support.ranks import run_on_ranks

pytestmark = [needs_deepspeed, pytest.mark.filterwarnings("error:.*lr_scheduler.step")]

ADAM: Any = {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}
STEPS = 5


def warmup(optimizer: Any) -> Any:
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 3))


def one_cycle(optimizer: Any) -> Any:
    return OneCycleLR(optimizer, max_lr=0.02, total_steps=8)


def two_parts(optimizer: Any) -> Any:
    parts: list[Any] = [LinearLR(optimizer, 0.5, 1.0, 2), StepLR(optimizer, 1, 0.5)]
    return SequentialLR(optimizer, parts, [2])


SCHEDULES = {"warmup": warmup, "one cycle": one_cycle, "two parts": two_parts}


def losses_of(accelerator: Accelerator, model: Any, optimizer: Any, schedule: Any) -> tuple[list[float], list[float]]:
    losses, rates = [], []
    for seed in range(STEPS):
        tokens = make_tokens(4, seed=seed)[accelerator.process_index :: accelerator.num_processes]
        loss = token_losses(model(tokens), tokens).mean()
        accelerator.backward(loss)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
    return losses, rates


def train(strategy: str, stage: int, kind: str, order: str) -> tuple[list[float], list[float]]:
    """Losses and rates; under DeepSpeed its JSON has the optimizer's type and nothing else of it."""
    plugin = DeepSpeedPlugin(
        hf_ds_config={
            "zero_optimization": {"stage": stage},
            "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        }
    )
    more: Any = {"deepspeed_plugin": plugin} if strategy == "deepspeed" else {"strategy": strategy}
    accelerator = Accelerator(cpu=True, **more)
    model: Any = TinyTransformer()
    made: Any = DummyOptim if strategy == "deepspeed" else torch.optim.AdamW
    optimizer: Any = made(model.parameters(), lr=0.01, **ADAM)
    schedule: Any
    match order:
        case "together":
            model, optimizer, schedule = accelerator.prepare(model, optimizer, SCHEDULES[kind](optimizer))
        case "after":
            model, optimizer = accelerator.prepare(model, optimizer)
            schedule = accelerator.prepare(SCHEDULES[kind](optimizer))
        case "before":
            schedule = SCHEDULES[kind](optimizer)
            optimizer, schedule = accelerator.prepare(optimizer), accelerator.prepare(schedule)
            model = accelerator.prepare(model)
        case "on the prepared optimizer":
            optimizer = accelerator.prepare(optimizer)
            schedule = accelerator.prepare(SCHEDULES[kind](optimizer))
            model = accelerator.prepare(model)
    return losses_of(accelerator, model, optimizer, schedule)


@pytest.mark.parametrize(
    ("stage", "kind", "order"),
    [
        (0, "warmup", "together"),
        (2, "warmup", "together"),
        (3, "warmup", "together"),
        (2, "one cycle", "together"),
        (2, "two parts", "together"),
        (2, "warmup", "after"),
        (2, "warmup", "before"),
        (2, "warmup", "on the prepared optimizer"),
    ],
)
def test_a_schedule_moves_the_described_optimizer(stage: int, kind: str, order: str) -> None:
    [(losses, rates)] = run_on_ranks(1, train, "single", 0, kind, "together")
    assert len(set(rates)) > 2
    for found, moved in run_on_ranks(2, train, "deepspeed", stage, kind, order):
        assert moved == pytest.approx(rates)
        assert found == pytest.approx(losses, abs=1e-4)


def plateau() -> list[float]:
    section = {"type": "AdamW", "params": {"torch_adam": True, "lr": 0.01}}
    plugin = DeepSpeedPlugin(hf_ds_config={"zero_optimization": {"stage": 2}, "optimizer": section})
    accelerator = Accelerator(cpu=True, deepspeed_plugin=plugin)
    model: Any = TinyTransformer()
    optimizer: Any = DummyOptim(model.parameters())
    schedule: Any = ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    rates = []
    for _ in range(3):
        schedule.step(1.0)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def test_a_schedule_that_follows_a_metric_moves_it_too() -> None:
    assert run_on_ranks(2, plateau) == [[0.01, 0.005, 0.0025]] * 2


def another_rate() -> str:
    section = {"type": "AdamW", "params": {"torch_adam": True, "lr": 0.05}}
    plugin = DeepSpeedPlugin(hf_ds_config={"zero_optimization": {"stage": 2}, "optimizer": section})
    accelerator = Accelerator(cpu=True, deepspeed_plugin=plugin)
    model: Any = TinyTransformer()
    optimizer = DummyOptim(model.parameters())
    with pytest.raises(PrepareError) as error:
        accelerator.prepare(model, optimizer, warmup(optimizer))
    return str(error.value)


def test_a_schedule_made_from_another_rate_is_refused() -> None:
    for message in run_on_ranks(2, another_rate):
        assert "a DummyOptim with lr=0.001" in message
        assert "optimizer.params.lr 0.05" in message
        assert "Write DummyOptim(parameters, lr=0.05)" in message


def prepared_again() -> tuple[list[float], list[float]]:
    section = {"type": "AdamW", "params": {"torch_adam": True}}
    plugin = DeepSpeedPlugin(hf_ds_config={"zero_optimization": {"stage": 2}, "optimizer": section})
    accelerator = Accelerator(cpu=True, deepspeed_plugin=plugin)
    module: Any = TinyTransformer()
    placeholder: Any = DummyOptim(module.parameters(), lr=0.01, **ADAM)
    schedule = warmup(placeholder)
    accelerator.prepare(module, placeholder, schedule)
    accelerator.free_memory()
    own = {id(p) for p in module.parameters()}
    assert all(id(p) in own for p in placeholder.param_groups[0]["params"])
    return losses_of(accelerator, *accelerator.prepare(module, placeholder, schedule))


def test_a_placeholder_may_be_prepared_again() -> None:
    [(_, rates)] = run_on_ranks(1, train, "single", 0, "warmup", "together")
    for _, moved in run_on_ranks(2, prepared_again):
        assert moved == pytest.approx(rates)
