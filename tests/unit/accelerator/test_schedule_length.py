"""How long a schedule says that it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules

from paceline.accelerator.stepping.schedule_length import planned_steps

if TYPE_CHECKING:
    from collections.abc import Callable


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)


def falling(num_training_steps: int) -> Callable[[int], float]:
    return lambda step: 1 - step / num_training_steps


MADE: dict[str, tuple[Callable[[Any], Any], int | None]] = {
    "OneCycleLR": (lambda o: schedules.OneCycleLR(o, 0.1, total_steps=7), 7),
    "OneCycleLR by epochs": (lambda o: schedules.OneCycleLR(o, 0.1, epochs=2, steps_per_epoch=4), 8),
    "CosineAnnealingLR": (lambda o: schedules.CosineAnnealingLR(o, 7), 7),
    "LinearLR": (lambda o: schedules.LinearLR(o, total_iters=7), 7),
    "PolynomialLR": (lambda o: schedules.PolynomialLR(o, total_iters=7), 7),
    "SequentialLR": (
        lambda o: schedules.SequentialLR(
            o, [schedules.ConstantLR(o, total_iters=3), schedules.CosineAnnealingLR(o, 7)], milestones=[3]
        ),
        10,
    ),
    "ChainedScheduler": (
        lambda o: schedules.ChainedScheduler(
            [schedules.LinearLR(o, total_iters=3), schedules.ExponentialLR(o, 0.9)], o
        ),
        3,
    ),
    "a closure": (lambda o: schedules.LambdaLR(o, falling(7)), 7),
    "a function": (lambda o: schedules.LambdaLR(o, lambda step: 0.9**step), None),
    "StepLR": (lambda o: schedules.StepLR(o, 7), None),
    "ReduceLROnPlateau": (lambda o: schedules.ReduceLROnPlateau(o), None),
}


@pytest.mark.filterwarnings("ignore:.*(lr_scheduler.step|epoch parameter).*")
@pytest.mark.parametrize("name", MADE)
def test_schedules_of_torch(name: str) -> None:
    make, wanted = MADE[name]
    assert planned_steps(make(optimizer())) == wanted


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup"])
def test_schedules_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    made = transformers.get_scheduler(name, optimizer(), num_warmup_steps=2, num_training_steps=7)
    assert planned_steps(made) == (None if name == "constant_with_warmup" else 7)


def test_what_is_no_schedule_of_torch() -> None:
    assert planned_steps(object()) is None
