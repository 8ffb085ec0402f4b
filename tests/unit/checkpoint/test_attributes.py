"""What training changes beside tensors: a resumed run equals one that was never stopped."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

from paceline import Accelerator

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Counting(nn.Module):
    """Warms up by a counter that is a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        result: torch.Tensor = self.linear(x) * self.calls / 3
        return result


class ExtraState(Counting):
    """The same with a state of its own, as torch provides for."""

    def __init__(self, kind: Callable[[int], Any] = lambda calls: {"calls": calls, "of": ("a", 1)}) -> None:
        super().__init__()
        self._calls = 0
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._calls += 1
        result: torch.Tensor = self.linear(x) * self._calls
        return result

    def get_extra_state(self) -> Any:
        return self.kind(self._calls)

    def set_extra_state(self, state: Any) -> None:
        self._calls = int(state["calls"] if isinstance(state, dict) else state)


class OwnDropout(nn.Module):
    """Drops by generators of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.source = torch.Generator().manual_seed(1)
        self.other = random.Random(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.rand(x.shape, generator=self.source) > 0.3
        result: torch.Tensor = self.linear(x * mask) * self.other.random()
        return result


class Running(nn.Module):
    """Keeps a running mean in a buffer that is not persistent."""

    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.register_buffer("mean", torch.zeros(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean += x.detach().mean(0)
        result: torch.Tensor = self.linear(x - self.mean)
        return result


class NoisySgd(torch.optim.SGD):
    """Adds noise that it draws itself, less in each step, and counts in its state."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.source = np.random.default_rng(1)
        self.calls = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        named: dict[Any, Any] = self.state
        named["total"] = named.get("total", 0.0) + float(self.source.random())
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad += named["total"] / self.calls
        return super().step(closure)


def counting_schedule() -> Callable[[int], float]:
    """A schedule that counts its own calls."""
    calls = 0

    def factor(_: int) -> float:
        nonlocal calls
        calls += 1
        return 1 / calls

    return factor


def train(model: nn.Module, sgd: bool, schedule: bool, folder: Path, *, resume: bool = False) -> list[list[float]]:
    accelerator = Accelerator(cpu=True, strategy="single")
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    if not sgd:
        optimizer = NoisySgd(model.parameters())
    scheduler: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, counting_schedule() if schedule else lambda _: 1.0)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    if resume:
        accelerator.load_state(folder)
    losses = []
    for step in range(optimizer.num_steps, 5):
        x = torch.arange(6.0).reshape(2, 3) / (step + 1)
        loss = model(x).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append([loss.item(), *scheduler.get_last_lr()])
        if step == 1 and not resume:
            accelerator.save_state(str(folder))
    return losses


MODELS: dict[str, tuple[Callable[[], nn.Module], bool, bool]] = {
    "counter": (Counting, True, False),
    "extra state": (ExtraState, True, False),
    "extra state, a tensor": (lambda: ExtraState(torch.tensor), True, False),
    "generators": (OwnDropout, True, False),
    "buffer": (Running, True, False),
    "optimizer": (lambda: nn.Linear(3, 1), False, False),
    "schedule": (lambda: nn.Linear(3, 1), True, True),
}


@pytest.mark.parametrize("case", MODELS)
def test_what_is_not_in_a_state_dict_is_resumed(case: str, tmp_path: Path) -> None:
    make, sgd, schedule = MODELS[case]
    torch.manual_seed(1)
    whole = train(make(), sgd, schedule, tmp_path / "state")
    assert train(make(), sgd, schedule, tmp_path / "state", resume=True) == whole[2:]


def test_what_a_script_sets_before_it_resumes_stays(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = Running()
    model.rate = 0.1  # type: ignore[assignment]
    train(model, True, False, tmp_path / "state")
    changed = Running()
    changed.rate = 0.5  # type: ignore[assignment]
    train(changed, True, False, tmp_path / "state", resume=True)
    assert changed.rate == 0.5
