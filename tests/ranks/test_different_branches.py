"""Ranks whose batches take different branches of a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paceline import FullyShardedDataParallelPlugin
from paceline.errors import SteppingError
from tests.support.engines import make, with_deepspeed
from tests.support.ranks import run_on_ranks


class Branches(nn.Module):
    """Two layers of the same size, of which a forward uses one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor, branch: int) -> Tensor:
        out: Tensor = (self.b if branch else self.a)(x)
        return out


def batches() -> Tensor:
    return torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1))


def wanted() -> dict[str, Tensor]:
    model = Branches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in batches():
        halves = [model(batch[rank::2], rank).pow(2).mean() for rank in range(2)]
        (sum(halves, torch.zeros(())) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def trained(strategy: str, finds: bool, first_apart: int) -> dict[str, Tensor] | str:
    more = {"fsdp_plugin": FullyShardedDataParallelPlugin(find_unused_parameters=True)} if finds else {}
    accelerator = make(strategy, **more)
    rank = accelerator.process_index
    model: Any = Branches()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    try:
        for number, batch in enumerate(batches()):
            branch = rank if number >= first_apart else number % 2
            accelerator.backward(model(batch[rank::2], branch).pow(2).mean())
            optimizer.step()
            optimizer.zero_grad()
    except SteppingError as error:
        return str(error)
    return accelerator.get_state_dict(model)


# Stage 3 gathers weights in the forward, where such ranks wait for each other.
STRATEGIES = ["fsdp", *with_deepspeed(["zero1", "zero2"])]


@pytest.mark.parametrize("first_apart", [0, 1])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_of_different_parameters_are_not_added_up(strategy: str, first_apart: int) -> None:
    for said in run_on_ranks(2, trained, strategy, False, first_apart):
        assert "a.weight, a.bias, b.weight, b.bias" in said
        assert "find_unused_parameters" in said


def test_unused_parameters_may_be_found() -> None:
    torch.testing.assert_close(run_on_ranks(2, trained, "fsdp", True, 0)[0], wanted(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", [*STRATEGIES, *with_deepspeed(["zero3"])])
def test_a_branch_that_all_ranks_take_is_no_error(strategy: str) -> None:
    assert isinstance(run_on_ranks(2, trained, strategy, False, 3)[0], dict)
