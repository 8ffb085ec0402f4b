"""Optimizers that compute the loss again in a closure: alike on all ranks, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from paceline.errors import PacelineError, PrepareError, SteppingError
from tests.support.engines import ZERO_STAGES, make
from tests.support.models import tanh_batches, tanh_model
from tests.support.ranks import run_on_ranks

STEPS = 4


class OwnSearch(torch.optim.Optimizer):
    """Halves its step until the loss falls."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            first = closure()
        parameters = [p for group in self.param_groups for p in group["params"]]
        gradients = [p.grad.clone() for p in parameters]
        lr = 20.0
        with torch.no_grad():
            before = [p.clone() for p in parameters]
            while lr > 0.01:
                for parameter, old, gradient in zip(parameters, before, gradients, strict=True):
                    parameter.copy_(old - lr * gradient)
                with torch.enable_grad():
                    later = closure()
                if float(later) < float(first):
                    break
                lr /= 2
        return first


OPTIMIZERS: dict[str, Any] = {
    "wolfe": lambda p: torch.optim.LBFGS(p, max_iter=5, line_search_fn="strong_wolfe"),
    "plain": lambda p: torch.optim.LBFGS(p, max_iter=5, tolerance_change=1e-3),
    "own": OwnSearch,
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
}


def wanted(kind: str) -> dict[str, Tensor]:
    model = tanh_model()
    optimizer = OPTIMIZERS[kind](model.parameters())
    for batch in tanh_batches(STEPS):

        def closure(batch: Tensor = batch) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(batch).pow(2).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)
    return model.state_dict()


def trained(strategy: str, kind: str, bypasses: bool = False, **arguments: Any) -> dict[str, Tensor]:
    accelerator = make(strategy, **arguments)
    model: Any = tanh_model(accelerator.process_index)
    model, optimizer = accelerator.prepare(model, OPTIMIZERS[kind](model.parameters()))
    called = accelerator.unwrap_model(model) if bypasses else model
    for batch in tanh_batches(STEPS):

        def closure(batch: Tensor = batch) -> Any:
            optimizer.zero_grad()
            loss = called(batch[accelerator.process_index :: accelerator.num_processes]).pow(2).mean()
            accelerator.backward(loss)
            return loss

        with accelerator.accumulate(model):
            optimizer.step(closure)
    return accelerator.get_state_dict(model)


@pytest.mark.parametrize("bypasses", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_rank_decides_by_the_loss_of_all(kind: str, bypasses: bool) -> None:
    found = run_on_ranks(2, trained, "ddp", kind, bypasses)[0]
    torch.testing.assert_close(found, wanted(kind), rtol=1e-3, atol=1e-4)


def test_a_sharded_model_is_stepped_with_a_closure() -> None:
    torch.testing.assert_close(run_on_ranks(2, trained, "fsdp", "sgd")[0], wanted("sgd"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["wolfe", "sgd"])
def test_a_closure_cannot_fill_a_window(kind: str) -> None:
    with pytest.raises(SteppingError, match="window of 2 micro-batches"):
        trained("single", kind, gradient_accumulation_steps=2)


@pytest.mark.parametrize("kind", ["wolfe", "sgd"])
def test_a_closure_may_go_through_the_micro_batches(kind: str) -> None:
    accelerator = make("single", gradient_accumulation_steps=2)
    model: Any = tanh_model()
    model, optimizer = accelerator.prepare(model, OPTIMIZERS[kind](model.parameters()))
    for batch in tanh_batches(STEPS):
        parts = batch.split(2)

        def closure(parts: tuple[Tensor, ...] = parts) -> Any:
            optimizer.zero_grad()
            losses = [model(part).pow(2).mean() for part in parts]
            for loss in losses:
                accelerator.backward(loss)
            return sum(losses) / len(losses)

        for _ in parts:
            with accelerator.accumulate(model):
                optimizer.step(closure)
    torch.testing.assert_close(model.state_dict(), wanted(kind), rtol=1e-3, atol=1e-4)


class Asks(torch.optim.SGD):
    """Looks at the loss without gradients before it steps."""

    def step(self, closure: Any = None) -> Any:
        closure(backward=False)
        return super().step(closure)


def test_a_closure_gets_what_its_optimizer_passes() -> None:
    accelerator = make("single")
    model: Any = tanh_model()
    model, optimizer = accelerator.prepare(model, Asks(model.parameters(), lr=0.1))
    asked: list[bool] = []

    def closure(backward: bool = True) -> Any:
        asked.append(backward)
        loss = model(tanh_batches(STEPS)[0]).pow(2).mean()
        if backward:
            accelerator.backward(loss)
        return loss

    optimizer.step(closure)
    assert asked == [False, True]


def refused(strategy: str) -> str:
    accelerator = make(strategy)
    model = tanh_model()
    with pytest.raises(PrepareError) as caught:
        accelerator.prepare(model, torch.optim.LBFGS(model.parameters()))
    return str(caught.value)


@pytest.mark.parametrize("strategy", ["fsdp", *ZERO_STAGES])
def test_lbfgs_is_refused_where_weights_are_in_pieces(strategy: str) -> None:
    assert all("LBFGS was prepared under" in said for said in run_on_ranks(2, refused, strategy))


def joined() -> str:
    accelerator = make("ddp")
    model: Any = tanh_model()
    model, optimizer = accelerator.prepare(model, torch.optim.LBFGS(model.parameters()))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(tanh_batches(STEPS)[0]).pow(2).mean()
        accelerator.backward(loss)
        return loss

    try:
        with accelerator.join_uneven_inputs([model]):
            optimizer.step(closure)
    except PacelineError as error:
        return str(error)
    return ""


def test_ranks_without_a_batch_have_no_loss() -> None:
    assert all("under join_uneven_inputs" in said for said in run_on_ranks(2, joined))
