"""Losses with gradients or weights in them: the numbers of one process, or an error that says what works."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from paceline.errors import PacelineError
from tests.support.engines import make, with_deepspeed
from tests.support.models import tanh_batches, tanh_model
from tests.support.ranks import run_on_ranks

STEPS = 3


def gradient_penalty(model: Any, inner: Any, x: Tensor) -> Tensor:
    """The gradient by the inputs, of what `inner` computes, is to have the norm 1."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(inner(x).sum(), x, create_graph=True)
    loss: Tensor = model(x).pow(2).mean() + gradient.pow(2).sum(1).sub(1).pow(2).mean()
    return loss


def adversarial(model: Any, inner: Any, x: Tensor) -> Tensor:
    """Inputs are moved along the gradient before the loss is computed."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(inner(x).sum(), x)
    loss: Tensor = model((x + 0.1 * gradient).detach()).pow(2).mean()
    return loss


def by_weights(model: Any, _inner: Any, x: Tensor) -> Tensor:
    """The gradient by the weights, which torch.autograd.grad is asked for."""
    gradients = torch.autograd.grad(model(x).pow(2).mean(), list(model.parameters()), create_graph=True)
    loss: Tensor = model(x).pow(2).mean() + sum(g.sum() for g in gradients)
    return loss


def weight_penalty(model: Any, _inner: Any, x: Tensor) -> Tensor:
    loss: Tensor = model(x).pow(2).mean() + 0.1 * sum(p.pow(2).sum() for p in model.parameters())
    return loss


def penalty_before(model: Any, _inner: Any, x: Tensor) -> Tensor:
    penalty = 0.1 * sum(p.pow(2).sum() for p in model.parameters())
    loss: Tensor = model(x).pow(2).mean() + penalty
    return loss


def penalty_of_shards(model: Any, _inner: Any, x: Tensor) -> Tensor:
    shards = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    loss: Tensor = model(x).pow(2).mean() + 0.1 * sum(shard.pow(2).sum() for shard in shards)
    return loss


LOSSES: dict[str, Any] = {
    loss.__name__: loss
    for loss in (gradient_penalty, adversarial, by_weights, weight_penalty, penalty_before, penalty_of_shards)
}


def wanted(kind: str) -> dict[str, Tensor]:
    model = tanh_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for batch in tanh_batches(STEPS):
        LOSSES[kind](model, model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def trained(strategy: str, kind: str, unwraps: bool) -> dict[str, Tensor] | str:
    accelerator = make(strategy)
    model: Any = tanh_model(accelerator.process_index)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    inner = accelerator.unwrap_model(model) if unwraps else model
    try:
        for batch in tanh_batches(STEPS):
            accelerator.backward(LOSSES[kind](model, inner, batch[accelerator.process_index :: 2]))
            optimizer.step()
            optimizer.zero_grad()
    except PacelineError as error:
        return str(error)
    return accelerator.get_state_dict(model)


@pytest.mark.parametrize(
    ("strategy", "kind", "unwraps"),
    [
        ("ddp", "gradient_penalty", False),
        ("ddp", "adversarial", False),
        ("ddp", "by_weights", False),
        ("ddp", "weight_penalty", False),
        ("fsdp", "adversarial", False),
        ("fsdp", "penalty_of_shards", False),
        *with_deepspeed(
            [
                (f"zero{stage}", kind, True)
                for stage in (0, 1, 2)
                for kind in ("gradient_penalty", "adversarial", "weight_penalty", "penalty_before")
            ]
        ),
    ],
)
def test_the_numbers_are_those_of_one_process(strategy: str, kind: str, unwraps: bool) -> None:
    found = run_on_ranks(2, trained, strategy, kind, unwraps)[0]
    torch.testing.assert_close(found, wanted(kind), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("strategy", "kind", "words"),
    [
        ("fsdp", "gradient_penalty", "with create_graph=True"),
        ("fsdp", "weight_penalty", "p.to_local()"),
        ("fsdp", "penalty_before", "p.to_local()"),
        *with_deepspeed(
            [
                (f"zero{stage}", kind, "accelerator.unwrap_model(model)")
                for stage in (0, 1, 2, 3)
                for kind in ("gradient_penalty", "adversarial", "by_weights")
            ]
            + [("zero3", kind, "weight_decay") for kind in ("weight_penalty", "penalty_before")]
        ),
    ],
)
def test_what_cannot_be_computed_is_refused(strategy: str, kind: str, words: str) -> None:
    for said in run_on_ranks(2, trained, strategy, kind, False):
        assert isinstance(said, str)
        assert words in said


def in_two_parts(strategy: str) -> str:
    """The penalty is a loss of its own."""
    accelerator = make(strategy)
    model: Any = tanh_model(accelerator.process_index)
    model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    accelerator.backward(model(tanh_batches(STEPS)[0]).pow(2).mean())
    try:
        accelerator.backward(0.1 * sum(p.pow(2).sum() for p in model.parameters()))
    except PacelineError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("ranks", "words"), [(1, ""), (2, "p.to_local()")])
def test_a_penalty_that_is_a_loss_of_its_own(ranks: int, words: str) -> None:
    """Torch cannot divide it over ranks."""
    for said in run_on_ranks(ranks, in_two_parts, "fsdp"):
        assert bool(said) == bool(words)
        assert words in said


def differentiated(strategy: str, unwraps: bool) -> list[Tensor]:
    """Gradients by the inputs that nothing differentiates again."""
    accelerator = make(strategy)
    model: Any = tanh_model()
    prepared, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    inner = accelerator.unwrap_model(prepared) if unwraps else prepared
    x = tanh_batches(STEPS)[0]
    by_function = torch.func.grad(lambda value: inner(value).sum())(x)
    return [by_function.detach()]


@pytest.mark.parametrize(
    ("strategy", "unwraps"), [("fsdp", False), *with_deepspeed([("zero1", False), ("zero2", False)])]
)
def test_functional_gradients_are_computed(strategy: str, unwraps: bool) -> None:
    x = tanh_batches(STEPS)[0].requires_grad_()
    (right,) = torch.autograd.grad(tanh_model()(x).sum(), x)
    torch.testing.assert_close(run_on_ranks(2, differentiated, strategy, unwraps)[0][0], right)


def with_graph() -> str:
    accelerator = make("ddp")
    model: Any = tanh_model()
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    try:
        accelerator.backward(model(tanh_batches(STEPS)[0]).pow(2).mean(), create_graph=True)
    except PacelineError as error:
        return str(error)
    return ""


def test_averaged_gradients_have_no_graph() -> None:
    assert all("create_graph=True" in said for said in run_on_ranks(2, with_graph))


def direct(strategy: str) -> bool:
    accelerator = make(strategy)
    model: Any = tanh_model()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = accelerator.get_state_dict(model)
    model(tanh_batches(STEPS)[0]).pow(2).mean().backward()
    optimizer.step()
    after = accelerator.get_state_dict(model)
    return any(not torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("strategy", with_deepspeed(["zero1", "zero2", "zero3"]))
def test_a_backward_of_the_script_is_not_taken_for_something_else(strategy: str) -> None:
    assert run_on_ranks(2, direct, strategy)[0]
