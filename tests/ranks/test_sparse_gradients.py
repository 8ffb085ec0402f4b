"""Embeddings with sparse gradients: trained and clipped as on one rank, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paceline.errors import PrepareError
from tests.support.engines import make, with_deepspeed
from tests.support.ranks import run_on_ranks


class Lookup(nn.Module):
    """An embedding, and a layer with dense gradients."""

    def __init__(self, sparse: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(10, 4, sparse=sparse), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.table(x))
        return out


def ids() -> Tensor:
    # The same row several times in a batch: such a gradient is not coalesced.
    return torch.randint(0, 10, (3, 8), generator=torch.Generator().manual_seed(1))


def wanted(clips: str) -> dict[str, Tensor]:
    """What dense gradients come to."""
    model = Lookup(sparse=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in ids():
        loss: Any = model(batch).pow(2).mean()
        loss.backward()
        if clips == "norm":
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        if clips == "value":
            nn.utils.clip_grad_value_(model.parameters(), 0.001)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def trained(strategy: str, clips: str) -> dict[str, Tensor]:
    accelerator = make(strategy)
    model: Any = Lookup()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for batch in ids():
        x = batch[accelerator.process_index :: accelerator.num_processes]
        accelerator.backward(model(x).pow(2).mean())
        if clips == "norm":
            accelerator.clip_grad_norm_(model.parameters(), 0.01)
        if clips == "value":
            accelerator.clip_grad_value_(model.parameters(), 0.001)
        optimizer.step()
        optimizer.zero_grad()
    return accelerator.get_state_dict(model)


@pytest.mark.parametrize("clips", ["no", "norm", "value"])
@pytest.mark.parametrize(("strategy", "ranks"), [("single", 1), ("ddp", 2)])
def test_sparse_gradients_are_those_of_dense_ones(strategy: str, ranks: int, clips: str) -> None:
    torch.testing.assert_close(run_on_ranks(ranks, trained, strategy, clips)[0], wanted(clips), rtol=1e-4, atol=1e-6)


def refused(strategy: str) -> str:
    accelerator = make(strategy)
    model = Lookup()
    with pytest.raises(PrepareError) as caught:
        accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return str(caught.value)


@pytest.mark.parametrize("strategy", ["fsdp", *with_deepspeed(["zero1", "zero2", "zero3"])])
def test_sharding_refuses_them_by_name(strategy: str) -> None:
    for said in run_on_ranks(2, refused, strategy):
        assert "table of Lookup has sparse gradients" in said


def frozen(strategy: str) -> int:
    accelerator = make(strategy)
    model: Any = Lookup()
    model.table.requires_grad_(False)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.head.parameters(), lr=0.1))
    accelerator.backward(model(ids()[0]).pow(2).mean())
    optimizer.step()
    return len(accelerator.get_state_dict(model))


@pytest.mark.parametrize("strategy", ["fsdp", *with_deepspeed(["zero2"])])
def test_a_frozen_table_has_no_gradient(strategy: str) -> None:
    assert run_on_ranks(2, frozen, strategy)[0] == 3
