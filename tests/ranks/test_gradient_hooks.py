"""Hooks on the gradients of parameters: called as on one rank, or refused where FSDP2 would never call them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paceline.errors import PrepareError, SteppingError
from tests.support.engines import make, with_deepspeed
from tests.support.ranks import run_on_ranks

STEPS = 3
KINDS = ["hook", "hook after accumulation"]


def fresh() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def double_in_place(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.mul_(2)


def register(kind: str, model: nn.Module) -> None:
    for parameter in model.parameters():
        if kind == "hook":
            parameter.register_hook(lambda gradient: gradient * 2)  # type: ignore[no-untyped-call]
        else:
            parameter.register_post_accumulate_grad_hook(double_in_place)  # type: ignore[no-untyped-call]


def batches() -> Tensor:
    return torch.randn(STEPS, 4, 6, generator=torch.Generator().manual_seed(1))


def wanted(kind: str) -> dict[str, Tensor]:
    model = fresh()
    register(kind, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in batches():
        model(batch).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def trained(strategy: str, kind: str, late: bool) -> dict[str, Tensor] | str:
    accelerator = make(strategy)
    model: Any = fresh()
    if not late:
        register(kind, model)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        model, optimizer = accelerator.prepare(model, optimizer)
        if late:
            register(kind, accelerator.unwrap_model(model))
        for batch in batches():
            accelerator.backward(model(batch[accelerator.process_index :: 2]).pow(2).mean())
            optimizer.step()
            optimizer.zero_grad()
    except (PrepareError, SteppingError) as error:
        return str(error)
    return accelerator.get_state_dict(model)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", ["ddp", *with_deepspeed(["zero1", "zero2", "zero3"])])
def test_hooks_are_called(strategy: str, kind: str, late: bool) -> None:
    torch.testing.assert_close(run_on_ranks(2, trained, strategy, kind, late)[0], wanted(kind), rtol=1e-4, atol=1e-5)


def test_a_hook_after_accumulation_is_called_under_fsdp_if_it_comes_after_prepare() -> None:
    found = run_on_ranks(2, trained, "fsdp", KINDS[1], True)[0]
    torch.testing.assert_close(found, wanted(KINDS[1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "late"), [("hook", False), ("hook", True), (KINDS[1], False)])
def test_fsdp_refuses_hooks_that_would_never_be_called(kind: str, late: bool) -> None:
    for said in run_on_ranks(2, trained, "fsdp", kind, late):
        assert "0.weight" in said
        assert "register_post_accumulate_grad_hook()" in said
