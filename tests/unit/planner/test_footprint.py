"""What training will take, measured on the optimizers themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from paceline.planner import measure
from tests.support.models import TinyTransformer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _optimizers_are_loaded() -> None:
    """The first step of a process makes torch set a variable of its own, which no test should be blamed for."""
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1).step()


def kept(optimizer: Optimizer) -> int:
    """Bytes of an optimizer's real state, without scalars such as step counts."""
    tensors = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    return sum(t.numel() * t.element_size() for t in tensors if t.numel() > 1)


def stepped(model: nn.Module, optimizer: Optimizer) -> int:
    """What the optimizer really keeps after a step of the whole model."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return kept(optimizer)


OPTIMIZERS: dict[str, tuple[Callable[[Any], Optimizer], float]] = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.1), 0),
    "momentum": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 4),
    "adamw": (lambda p: torch.optim.AdamW(p, lr=0.1), 8),
    "adamw, fused": (lambda p: torch.optim.AdamW(p, lr=0.1, fused=True), 8),
    "adam, amsgrad": (lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True), 12),
    "rmsprop": (lambda p: torch.optim.RMSprop(p, lr=0.1), 4),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_is_what_the_optimizer_really_keeps(name: str) -> None:
    make, bytes_per_element = OPTIMIZERS[name]
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 8))
    optimizer = make(model.parameters())
    elements = sum(p.numel() for p in model.parameters())
    got = measure([model], [optimizer], CPU)
    assert not optimizer.state, "measuring must not step the real optimizer"
    assert all(p.grad is None for p in model.parameters())
    assert got.optimizer == elements * bytes_per_element == stepped(model, optimizer)
    assert got.parameters == got.gradients == got.placed == 4 * elements
    assert got.total == got.parameters + got.gradients + got.optimizer


def test_a_factored_optimizer_keeps_little() -> None:
    model = nn.Linear(512, 512)
    got = measure([model], [torch.optim.Adafactor(model.parameters())], CPU)
    assert 0 < got.optimizer < 0.5 * got.parameters


def test_half_precision_halves_everything() -> None:
    model = nn.Linear(32, 32).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters())
    elements = 32 * 33
    got = measure([model], [optimizer], CPU)
    assert (got.parameters, got.gradients) == (2 * elements, 2 * elements)
    assert got.optimizer == 4 * elements == stepped(model, optimizer)


def test_without_an_optimizer_adam_is_assumed() -> None:
    model = nn.Linear(10, 10)
    assert measure([model], [], CPU).optimizer == 8 * 110


def test_an_optimizer_that_cannot_be_tried_counts_as_adam() -> None:
    class Stubborn(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise RuntimeError("only on a Tuesday")

    model = nn.Linear(10, 10)
    assert measure([model], [Stubborn(model.parameters())], CPU).optimizer == 8 * 110


def test_groups_of_one_optimizer_are_weighed_apart() -> None:
    model = nn.ModuleList([nn.Linear(10, 10, bias=False), nn.Linear(20, 20, bias=False)])
    groups: list[dict[str, Any]] = [
        {"params": model[0].parameters(), "momentum": 0.9},
        {"params": model[1].parameters()},
    ]
    got = measure([model], [torch.optim.SGD(groups, lr=0.1)], CPU)
    assert got.optimizer == 4 * 100


def test_only_what_an_optimizer_holds_has_state() -> None:
    model = nn.ModuleList([nn.Linear(10, 10, bias=False), nn.Linear(20, 20, bias=False)])
    got = measure([model], [torch.optim.AdamW(model[0].parameters())], CPU)
    assert got.optimizer == 8 * 100
    assert got.gradients == 4 * 500


def test_frozen_shared_and_buffered() -> None:
    model = TinyTransformer(width=16, layers=2)
    model.blocks[0].requires_grad_(False)
    frozen = sum(p.numel() for p in model.blocks[0].parameters())
    elements = sum(p.numel() for p in model.parameters())  # a tied weight is yielded once
    trained = [p for p in model.parameters() if p.requires_grad]
    got = measure([model, model], [torch.optim.AdamW(trained)], CPU)
    assert got.parameters == 4 * (elements + 1), "the buffer `scale` counts"
    assert got.gradients == 4 * (elements - frozen)
    assert got.optimizer == 8 * (elements - frozen)


def test_what_is_on_the_meta_device_is_not_placed() -> None:
    with torch.device("meta"):
        model = nn.Linear(100_000, 10_000, bias=False)
    got = measure([model], [torch.optim.AdamW(model.parameters())], CPU)
    assert got.total == 16 * 10**9
    assert got.placed == 0


def test_closures_and_initial_rates_do_not_disturb() -> None:
    model = nn.Linear(10, 10)
    optimizer = torch.optim.AdamW(model.parameters())
    torch.optim.lr_scheduler.LinearLR(optimizer)  # adds `initial_lr` to the groups
    assert measure([model], [optimizer], CPU).optimizer == 8 * 110
    assert measure([model], [torch.optim.LBFGS(model.parameters())], CPU).optimizer == 8 * 110
