"""Several prepared models that have parameters in common."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paceline.errors import PacelineError
from tests.support.engines import make, with_deepspeed
from tests.support.ranks import run_on_ranks


class WithHead(nn.Module):
    """A head on a body that another model may have, too."""

    def __init__(self, body: nn.Module, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head = body, nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x).tanh())
        return out


def pair() -> tuple[Any, Any]:
    torch.manual_seed(0)
    body = nn.Linear(6, 8)
    return WithHead(body, 1), WithHead(body, 2)


def optimizers_of(one: nn.Module, other: Any) -> list[Any]:
    return [torch.optim.SGD(one.parameters(), lr=0.1), torch.optim.SGD(other.head.parameters(), lr=0.1)]


def batches() -> Tensor:
    return torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1))


def wanted() -> list[dict[str, Tensor]]:
    one, other = pair()
    optimizers = optimizers_of(one, other)
    for batch in batches():
        (one(batch).pow(2).mean() + other(batch).sub(1).pow(2).mean()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return [one.state_dict(), other.state_dict()]


def trained(strategy: str, at_once: bool) -> list[dict[str, Tensor]] | str:
    accelerator = make(strategy)
    one, other = pair()
    try:
        one, other, *optimizers = accelerator.prepare(one, other, *optimizers_of(one, other))
        for batch in batches():
            x = batch[accelerator.process_index :: 2]
            if at_once:
                accelerator.backward(one(x).pow(2).mean() + other(x).sub(1).pow(2).mean())
            else:
                accelerator.backward(one(x).pow(2).mean())
                accelerator.backward(other(x).sub(1).pow(2).mean())
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    except PacelineError as error:
        return str(error)
    return [accelerator.get_state_dict(one), accelerator.get_state_dict(other)]


def test_models_with_one_body_are_trained_one_after_the_other() -> None:
    found = run_on_ranks(2, trained, "ddp", False)[0]
    for state, right in zip(found, wanted(), strict=True):
        torch.testing.assert_close(state, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("strategy", "at_once"),
    [
        ("ddp", True),
        *[("fsdp", at_once) for at_once in (False, True)],
    ],
)
def test_a_body_that_two_engines_would_train_is_named(strategy: str, at_once: bool) -> None:
    for said in run_on_ranks(2, trained, strategy, at_once):
        assert isinstance(said, str)
        assert "body.weight, body.bias" in said
        assert "into one module that calls" in said


@pytest.mark.parametrize("strategy", with_deepspeed(["zero1", "zero2", "zero3"]))
def test_a_backward_that_reaches_the_body_of_another_engine_is_refused(strategy: str) -> None:
    for said in run_on_ranks(2, trained, strategy, False):
        assert isinstance(said, str)
        assert "The backward of WithHead reached body." in said
        assert "into one module that calls" in said


def stepped_twice(strategy: str) -> str:
    accelerator = make(strategy)
    one, other = pair()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (one, other)]
    try:
        accelerator.prepare(one, other, *optimizers)
    except PacelineError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("strategy", with_deepspeed(["zero1", "zero2", "zero3"]))
def test_a_body_of_two_optimizers_is_named(strategy: str) -> None:
    for said in run_on_ranks(2, stepped_twice, strategy):
        assert "body.weight, body.bias of WithHead are in WithHead, too" in said


class OnFeatures(WithHead):
    """Trains its head only: its body is another model's."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.body(x).tanh()
        out: Tensor = self.head(features)
        return out


def actor_and_critic() -> tuple[Any, Any]:
    actor, _ = pair()
    return actor, OnFeatures(actor.body, 2)


def with_features(strategy: str | None) -> list[dict[str, Tensor]]:
    """Without a strategy in plain PyTorch."""
    actor, critic = actor_and_critic()
    optimizers: list[Any] = optimizers_of(actor, critic)
    accelerator = None if strategy is None else make(strategy)
    if accelerator is not None:
        actor, critic, *optimizers = accelerator.prepare(actor, critic, *optimizers)
    for batch in batches():
        x = batch if accelerator is None else batch[accelerator.process_index :: 2]
        for model, goal in ((actor, 0), (critic, 1)):
            loss = model(x).sub(goal).pow(2).mean()
            loss.backward() if accelerator is None else accelerator.backward(loss)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    models = (actor, critic)
    return [model.state_dict() if accelerator is None else accelerator.get_state_dict(model) for model in models]


@pytest.mark.parametrize("strategy", with_deepspeed(["zero1", "zero2", "zero3"]))
def test_a_model_may_use_the_body_of_another_without_training_it(strategy: str) -> None:
    found = run_on_ranks(2, with_features, strategy)[0]
    for state, right in zip(found, with_features(None), strict=True):
        torch.testing.assert_close(state, right, rtol=1e-4, atol=1e-4)


def part_of_prepared() -> str:
    accelerator = make("fsdp")
    model, _ = pair()
    accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    try:
        accelerator.prepare(model.body)
    except PacelineError as error:
        return str(error)
    return ""


def test_a_part_of_a_sharded_model_is_no_model_of_its_own() -> None:
    for said in run_on_ranks(2, part_of_prepared):
        assert "weight, bias of Linear are in WithHead, too" in said
