"""Adapters trained on a model whose weights are on disk, on one process; several ranks are refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from paceline import Accelerator
from paceline.errors import PrepareError
from paceline.placement import dispatch_model
from tests.support.ranks import run_on_ranks
from tests.unit.placement.towers import Tower, ids, tower

MAP = {"embedding": "cpu", "blocks": "disk", "head": "cpu"}


def frozen_but_the_head() -> Tower:
    model = tower(tied=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("embedding", "head")))
    return model


def losses(model: nn.Module, steps: int = 4) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    found = []
    for _ in range(steps):
        loss = F.cross_entropy(model(ids()), ids())
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def test_adapters_learn_on_offloaded_weights(tmp_path: Path) -> None:
    model = frozen_but_the_head()
    expected = losses(copy.deepcopy(model))
    dispatch_model(model, MAP, offload_dir=tmp_path)
    assert model.blocks[0].inner.weight.device.type == "meta"  # type: ignore[union-attr]
    found = losses(model)
    assert found == expected
    assert found[-1] < found[0]


def test_an_optimizer_of_offloaded_weights_is_refused(tmp_path: Path) -> None:
    """Its steps would change nothing, without a word."""
    model = tower(tied=False)
    dispatch_model(model, MAP, offload_dir=tmp_path)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(PrepareError, match=r"An optimizer has \d+ weights of Tower that hooks keep .* Freeze them"):
        Accelerator(cpu=True).prepare(model, optimizer)


def _refused(folder: str) -> str:
    model = frozen_but_the_head()
    dispatch_model(model, MAP, offload_dir=Path(folder, str(torch.distributed.get_rank())))
    with pytest.raises(PrepareError) as caught:
        Accelerator(cpu=True, strategy="ddp").prepare(model)
    return str(caught.value)


def test_several_ranks_are_refused(tmp_path: Path) -> None:
    for message in run_on_ranks(2, _refused, str(tmp_path)):
        assert "is spread over cpu, disk by a device map, and there are 2 ranks" in message
