"""torch's fused optimizers on shards: the weights of one process, also for kinds for which DTensor has no rule."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from paceline import Accelerator
from paceline.errors import SteppingError
from paceline.strategies.fsdp.fused_steps import fuse_steps_of_shards
from tests.support.models import tanh_batches, tanh_model
from tests.support.ranks import run_on_ranks

KINDS: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 0.01},
    "Adam": {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1},
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "Adagrad": {"lr": 0.1},
}


def trained(kind: str, lr: Any, inputs: slice, accelerator: Accelerator | None) -> dict[str, torch.Tensor]:
    """Weights after five steps on part of each batch."""
    model: Any = tanh_model()
    optimizer: Any = getattr(torch.optim, kind)(model.parameters(), **{**KINDS[kind], "lr": lr}, fused=True)
    if accelerator is not None:
        model, optimizer = accelerator.prepare(model, optimizer)
    for batch in tanh_batches(5):
        loss = model(batch[inputs]).square().mean()
        if accelerator is None:
            loss.backward()
        else:
            accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.state_dict() if accelerator is None else accelerator.get_state_dict(model))


def on_rank(kind: str, is_tensor: bool) -> None:
    lr = KINDS[kind]["lr"]
    expected = trained(kind, lr, slice(None), None)
    accelerator = Accelerator(cpu=True, strategy="fsdp")
    part = slice(accelerator.process_index, None, accelerator.num_processes)
    found = trained(kind, torch.tensor(lr) if is_tensor else lr, part, accelerator)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], msg=f"{kind} {name}")


@pytest.mark.parametrize(("kind", "is_tensor"), [*((kind, False) for kind in KINDS), ("AdamW", True)])
def test_shards_end_as_whole_weights_do(kind: str, is_tensor: bool) -> None:
    run_on_ranks(2, on_rank, kind, is_tensor)


def other_placements(_: int) -> None:
    fuse_steps_of_shards()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows = torch.arange(8.0).reshape(4, 2)
    parameter = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
    parameter.grad = distribute_tensor(rows, mesh, [Replicate()])
    torch.optim.SGD([parameter], lr=0.1, fused=True).step()
    torch.testing.assert_close(cast("DTensor", parameter).full_tensor(), 1 - 0.1 * rows)
    # It makes its state like the gradient.
    with pytest.raises(SteppingError, match="fused=False"):
        torch.optim.SGD([parameter], lr=0.1, momentum=0.9, fused=True).step()


def test_a_whole_gradient_is_divided_and_a_whole_state_refused() -> None:
    run_on_ranks(2, other_placements, 0)
