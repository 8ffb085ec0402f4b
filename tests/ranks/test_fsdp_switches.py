"""FSDP2's switches for overlap: no number depends on them, and weights that stay gathered never become stale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from paceline import Accelerator
from paceline.config import FullyShardedDataParallelPlugin
from paceline.errors import PrepareError, SteppingError
from paceline.strategies.fsdp.overlap import check_switches
from tests.support.models import TinyTransformer, make_tokens, token_losses
from tests.support.ranks import run_on_ranks

SWITCHES: dict[str, dict[str, Any]] = {
    "none": {},
    "last unit kept": {"keep_last_unit": True},
    "prefetch": {"prefetch_units": 2, "keep_last_unit": True},
    "prefetch all": {"prefetch_units": 9},
    "kept": {"reshard_after_forward": False},
    "separate group": {"separate_reduce_scatter_group": True},
    "buffers": {"reduce_scatter_buffers": 2},
    "unused": {"find_unused_parameters": True},
    "all": {"prefetch_units": 1, "separate_reduce_scatter_group": True, "reduce_scatter_buffers": 3},
}


def has(settings: dict[str, Any]) -> bool:
    """Whether this torch has the switches."""
    try:
        check_switches(FullyShardedDataParallelPlugin(**settings))
    except PrepareError:
        return False
    return True


def train(settings: dict[str, Any], *, look: str = "", accumulation: int = 1) -> tuple[list[float], str]:
    """Losses over all ranks; `look` evaluates between backward and step, and again after it."""
    plugin = FullyShardedDataParallelPlugin(**settings)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, gradient_accumulation_steps=accumulation)
    model: Any = TinyTransformer()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.05))
    losses = []

    listed = list(model.parameters())

    def evaluate() -> None:
        tokens = make_tokens(2, seed=100)
        with torch.set_grad_enabled(look == "with gradients"):
            losses.append(float(token_losses(model(tokens), tokens).mean()))

    for i in range(4):
        tokens = make_tokens(4, seed=i)[accelerator.process_index :: accelerator.num_processes]
        with accelerator.accumulate(model):
            loss = token_losses(model(tokens), tokens).mean()
            accelerator.backward(loss)
            if look:
                evaluate()
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(listed, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if look:
            evaluate()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
    return losses, accelerator.describe()


def on_rank(_: int) -> None:
    for look, accumulation in (("", 1), ("without gradients", 1), ("with gradients", 2)):
        expected, said = train(SWITCHES["none"], look=look, accumulation=accumulation)
        assert "parameters dropped after the forward" in said
        for name, settings in SWITCHES.items():
            if has(settings) and (not look or name in ("last unit kept", "kept", "prefetch")):
                found, said = train(settings, look=look, accumulation=accumulation)
                assert found == pytest.approx(expected, abs=1e-6), (name, look, accumulation)
    assert "but for the last unit and the rest" in train({"keep_last_unit": True})[1]
    assert "2 units gathered ahead" in train({"prefetch_units": 2})[1]

    accelerator = Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(keep_last_unit=True))
    model: Any = accelerator.prepare_model(TinyTransformer())
    tokens = make_tokens(2)
    accelerator.backward(token_losses(model(tokens), tokens).mean())
    with torch.no_grad():
        model(tokens)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    model(tokens)
    with pytest.raises(SteppingError, match="a forward after the last backward has gathered"):
        accelerator.clip_grad_norm_(model.parameters(), 1.0)


@pytest.mark.slow
def test_no_loss_depends_on_a_switch_and_no_weight_is_stale() -> None:
    run_on_ranks(2, on_rank, 0)


class Two(nn.Module):
    """Each rank uses a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))

    def forward(self, x: torch.Tensor, which: int) -> torch.Tensor:
        for branch in self.branches:
            # Both are gathered by both ranks; one is not used for the result.
            x = x + branch(x) if branch is self.branches[which] else x + 0 * branch(x).detach()
        return x


def unused(_: int) -> None:
    # A unit that only one rank uses is gathered for the backward by that rank alone: it has to stay gathered.
    plugin = FullyShardedDataParallelPlugin(find_unused_parameters=True, reshard_after_forward=False)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    model: Any = Two()
    before = [p.detach().clone() for p in model.parameters()]
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.backward(model(torch.ones(2, 4), accelerator.process_index).sum())
    optimizer.step()
    after = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        assert all(not torch.equal(one, other) for one, other in zip(before, after.values(), strict=True))


@pytest.mark.skipif(not has({"find_unused_parameters": True}), reason="this torch has no such switch")
def test_ranks_may_use_different_parameters() -> None:
    run_on_ranks(2, unused, 0)


def test_a_switch_that_this_torch_lacks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(FSDPModule, "set_separate_reduce_scatter_group", raising=False)
    with pytest.raises(PrepareError, match="has no set_separate_reduce_scatter_group"):
        check_switches(FullyShardedDataParallelPlugin(separate_reduce_scatter_group=True))
