"""What leaves CUDA graphs is copied, shown with memory that is written over as theirs is."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from paceline.strategies.cuda_graphs import Replayed, would_overwrite

if TYPE_CHECKING:
    from collections.abc import Callable


class Overwriting(torch.autograd.Function):
    """A product whose gradients lie where those of the backward before lay."""

    memory: dict[str, Tensor] = {}

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return put("x", gradients[0] * weight), put("weight", gradients[0] * x)


def put(name: str, value: Tensor) -> Tensor:
    memory = Overwriting.memory.setdefault(name, torch.empty_like(value))
    memory.copy_(value)
    # As torch does for each replay: another tensor at the same address.
    return torch.from_numpy(memory.numpy())


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, 3.0]))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        return Overwriting.apply(x, self.weight)  # type: ignore[no-any-return, no-untyped-call]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    Overwriting.memory.clear()
    gc.collect()


def accumulate(block: Product, replayed: Any, inputs: list[Tensor]) -> None:
    for x in inputs:
        result: Any = replayed((x,), {})
        result.sum().backward()


def test_gradients_accumulate() -> None:
    block = Product()
    accumulate(block, Replayed(block, block), [torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])])
    assert block.weight.grad is not None
    assert block.weight.grad.tolist() == [11.0, 22.0]


def test_parameters_that_are_unfrozen_or_new_are_copied_as_well() -> None:
    block = Product()
    block.weight.requires_grad_(False)
    replayed = Replayed(block, block)
    accumulate(block, replayed, [torch.ones(2, requires_grad=True)])
    block.weight.requires_grad_(True)
    accumulate(block, replayed, [torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])])
    assert block.weight.grad is not None
    assert block.weight.grad.tolist() == [11.0, 22.0]
    block.load_state_dict({"weight": torch.tensor([5.0, 5.0])}, assign=True)
    accumulate(block, replayed, [torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])])
    assert block.weight.grad is not None
    assert block.weight.grad.tolist() == [11.0, 22.0]


@pytest.mark.parametrize("way", ["itself", "expanded for one sample", "added"])
def test_gradients_of_what_is_passed_in_are_copied(way: str) -> None:
    """A learnt query or token reaches the first block as it is, or through a view."""
    block, token = Product(), nn.Parameter(torch.tensor([1.0, 1.0]))
    replayed = Replayed(block, block)
    enter: dict[str, Callable[[], Tensor]] = {
        "itself": lambda: token,
        "expanded for one sample": lambda: token.expand(2),
        "added": lambda: torch.zeros(2) + token,
    }
    for factor in (1.0, 10.0):
        result: Any = replayed((enter[way](),), {})
        (result * factor).sum().backward()
    assert token.grad is not None
    assert token.grad.tolist() == [22.0, 33.0]
    assert len(token._backward_hooks or {}) <= 1


def test_what_a_block_passes_to_the_next_is_not_copied() -> None:
    block = Product()
    replayed = Replayed(block, block)
    x = replayed((torch.ones(2),), {})
    hooks = len(x._backward_hooks)
    replayed((x,), {})
    assert len(x._backward_hooks) == hooks


def test_a_forward_between_two_backwards_is_noticed() -> None:
    block = Product()
    replayed = Replayed(block, block)
    first, second = replayed((torch.ones(2),), {}), replayed((torch.ones(2),), {})
    assert not would_overwrite()
    first.sum().backward()
    assert would_overwrite()
    second.sum().backward()
    assert not would_overwrite()


def test_what_is_never_run_backward_is_forgotten() -> None:
    block = Product()
    replayed = Replayed(block, block)
    first, dropped = replayed((torch.ones(2),), {}), replayed((torch.ones(2),), {})
    first.sum().backward()
    del dropped
    assert not would_overwrite()


def test_copies_end_and_keep_nothing_alive() -> None:
    block = Product()
    replayed = Replayed(block, block)
    accumulate(block, replayed, [torch.ones(2)])
    assert block.weight._backward_hooks
    replayed.end()
    assert not block.weight._backward_hooks
    accumulate(block, replayed, [torch.ones(2)])
    gc.disable()
    try:
        weight = weakref.ref(block.weight)
        del block, replayed
        assert weight() is None
    finally:
        gc.enable()
