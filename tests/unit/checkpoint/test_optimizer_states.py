"""Optimizers with options and states of every type: a resumed run equals one that was never stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, MultiplicativeLR

from paceline import Accelerator
from paceline.strategies.state import load_options

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

STEPS, SAVED_AFTER = 6, 3


class OwnOptions(Optimizer):
    """Counts in options of its groups that are a dictionary and a vector."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.enable_grad():
            closure()
        for group in self.param_groups:
            group["counts"] = {"steps": group.get("counts", {"steps": 0})["steps"] + 1, 2: None}
            group["sums"] = group.get("sums", torch.zeros(2)) + 1
            for parameter in group["params"]:
                parameter.sub_(parameter.grad * group["lr"] / group["counts"]["steps"] / group["sums"][0])


OPTIONS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "a rate of NumPy": (lambda p: SGD(p, lr=np.float32(0.1)), lambda o: ExponentialLR(o, 0.8)),
    "a factor of NumPy": (lambda p: SGD(p, lr=0.1), lambda o: MultiplicativeLR(o, lambda _: np.float32(0.8))),
    "a schedule of NumPy": (lambda p: SGD(p, lr=0.1), lambda o: LambdaLR(o, lambda e: np.float32(0.8) ** e)),
    "a rate of shape [1]": (lambda p: AdamW(p, lr=torch.tensor([0.1])), lambda o: ExponentialLR(o, 0.8)),
    "betas in tensors": (
        lambda p: AdamW(p, lr=torch.tensor(0.1), betas=(torch.tensor(0.8), torch.tensor(0.9)), foreach=False),
        lambda o: ExponentialLR(o, 0.8),
    ),
    "containers": (OwnOptions, lambda o: ExponentialLR(o, 0.8)),
}


class Training:
    """A small training whose batches depend on the number of steps taken."""

    def __init__(self, make_optimizer: Callable[[Any], Any], make_schedule: Callable[[Any], Any], seed: int) -> None:
        torch.manual_seed(seed)
        self.accelerator = Accelerator(cpu=True, strategy="single")
        model: Any = nn.Linear(3, 2)
        optimizer = make_optimizer(model.parameters())
        prepared: Any = self.accelerator.prepare(model, optimizer, make_schedule(optimizer))
        self.model, self.optimizer, self.scheduler = prepared

    def train(self) -> list[float]:
        """Train to the end; return weights and rates."""
        for step in range(self.optimizer.num_steps, STEPS):
            self._step(torch.linspace(-1, 1, 12).reshape(4, 3) * (step + 1))
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        return [*self.model.weight.flatten().tolist(), *self.model.bias.tolist(), *rates]

    def _step(self, x: torch.Tensor) -> None:
        def closure() -> torch.Tensor:
            self.optimizer.zero_grad()
            loss: torch.Tensor = (self.model(x) - 1).square().mean()
            self.accelerator.backward(loss)
            return loss

        self.optimizer.step(closure)
        self.scheduler.step()

    def stop_at(self, step: int) -> None:
        """Train up to a step."""
        while self.optimizer.num_steps < step:
            self._step(torch.linspace(-1, 1, 12).reshape(4, 3) * (self.optimizer.num_steps + 1))


def assert_resumes(make_optimizer: Callable[[Any], Any], make_schedule: Callable[[Any], Any], folder: Path) -> None:
    whole = Training(make_optimizer, make_schedule, seed=1)
    whole.stop_at(SAVED_AFTER)
    whole.accelerator.save_state(folder)
    expected = whole.train()
    for steps_before in (0, 2):
        resumed = Training(make_optimizer, make_schedule, seed=2)
        resumed.stop_at(steps_before)
        resumed.accelerator.load_state(folder)
        assert resumed.train() == expected


@pytest.mark.parametrize("case", OPTIONS)
def test_options_of_every_type_are_resumed(case: str, tmp_path: Path) -> None:
    assert_resumes(*OPTIONS[case], tmp_path / "state")


def test_a_rate_that_began_as_an_integer_keeps_its_fraction() -> None:
    group: dict[str, Any] = {"lr": np.int64(1), "momentum": np.float32(0.1), "power": np.int64(2)}
    load_options(group, {"lr": 0.5, "momentum": 0.25, "power": 3})
    assert group == {"lr": 0.5, "momentum": 0.25, "power": 3}
    assert type(group["momentum"]) is np.float32
