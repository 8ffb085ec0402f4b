"""What FSDP2 cannot shard or step is named, with what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from paceline import Accelerator
from paceline.config import FullyShardedDataParallelPlugin
from paceline.errors import PrepareError, SteppingError
from tests.support.models import tanh_batches, tanh_model
from tests.support.ranks import run_on_ranks


def mixed_dtypes(_: int) -> None:
    accelerator = Accelerator(cpu=True, strategy="fsdp")
    model = tanh_model()
    model[2].bfloat16()
    with pytest.raises(PrepareError, match=r"2 dtypes: 0.weight is fp32, 2.weight is bf16"):
        accelerator.prepare(model)
    model[2].requires_grad_(False)
    accelerator.prepare(model)
    # A dtype for each unit is no mixture.
    blocks = nn.Sequential(tanh_model().bfloat16(), tanh_model())
    accelerator.free_memory()
    units = FullyShardedDataParallelPlugin(transformer_cls_names_to_wrap=("Linear",))
    accelerator = Accelerator(cpu=True, strategy="fsdp", fsdp_plugin=units)
    accelerator.prepare(blocks)


def test_a_unit_of_several_dtypes() -> None:
    run_on_ranks(1, mixed_dtypes, 0)


def cannot_step(name: str) -> None:
    accelerator = Accelerator(cpu=True, strategy="fsdp")
    model: Any = tanh_model()
    optimizer: Any = getattr(torch.optim, name)(model.parameters(), lr=0.01)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(model(tanh_batches(1)[0]).square().mean())
    with pytest.raises(SteppingError, match=rf"{name} cannot step on FSDP2's shards.*AdamW"):
        optimizer.step()


@pytest.mark.parametrize("name", ["Rprop", "Adafactor"])
def test_an_optimizer_for_whole_weights(name: str) -> None:
    run_on_ranks(2, cannot_step, name)
