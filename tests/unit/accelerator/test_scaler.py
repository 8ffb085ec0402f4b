"""The fp16 loss scale of a resumed run is that of an uninterrupted one, whatever the last step before the save was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from paceline import Accelerator, GradScalerKwargs
from paceline.errors import SteppingError

if TYPE_CHECKING:
    from pathlib import Path

BATCHES = 14
OVERFLOWS = (3, 4, 11)


def train(folder: Path, accumulation: int, *, stop: int = BATCHES, resume: bool = False) -> list[tuple[float, ...]]:
    """For each batch: its number, the scale and steps since it grew, the learning rate, the weights, steps taken."""
    torch.manual_seed(0)
    scaling = GradScalerKwargs(init_scale=1024.0, growth_interval=3)
    accelerator = Accelerator(
        cpu=True, mixed_precision="fp16", gradient_accumulation_steps=accumulation, kwargs_handlers=[scaling]
    )
    model: Any = nn.Linear(4, 1)
    optimizer: Any = torch.optim.AdamW(model.parameters(), 1e-2)
    schedule: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    loader: Any = DataLoader([torch.randn(4) for _ in range(2 * BATCHES)], batch_size=2, shuffle=True)  # type: ignore[arg-type,unused-ignore]
    model, optimizer, schedule, loader = accelerator.prepare(model, optimizer, schedule, loader)
    if resume:
        accelerator.load_state(folder)
    number = int(loader.state_dict()["batches"])
    log: list[tuple[float, ...]] = []
    for batch in loader:
        number += 1
        with accelerator.accumulate(model):
            loss = model(batch).float().square().mean()
            accelerator.backward(loss * torch.inf if number in OVERFLOWS else loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        assert accelerator.scaler is not None
        scale = accelerator.scaler.state_dict()
        plain: Any = accelerator.unwrap_model(model)
        weights = float(plain.weight.detach().sum())
        counts = (scale["scale"], scale["_growth_tracker"], optimizer.num_steps)
        log.append((number, *counts, schedule.get_last_lr()[0], weights))
        if number == stop:
            accelerator.save_state(folder)
            break
    return log


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_before_the_save_counts_for_the_scale(accumulation: int, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", accumulation)
    assert {512.0, 1024.0} <= {scale for _, scale, *_ in whole}, "it shrinks and grows"
    for stop in (2, 4, 8, 12):
        first = train(tmp_path / str(stop), accumulation, stop=stop)
        assert first + train(tmp_path / str(stop), accumulation, resume=True) == whole


def test_a_state_that_is_loaded_ends_what_was_pending(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="fp16", kwargs_handlers=[GradScalerKwargs(init_scale=64.0)])
    model: Any = nn.Linear(4, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    accelerator.backward(model(torch.ones(2, 4)).sum())
    optimizer.step()
    optimizer.zero_grad()
    accelerator.save_state(tmp_path)
    accelerator.backward(model(torch.ones(2, 4)).sum() * torch.inf)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.load_state(tmp_path)
    accelerator.backward(model(torch.ones(2, 4)).sum())
    assert accelerator.scaler is not None
    assert accelerator.scaler.get_scale() == 64.0


def test_a_step_without_gradients_is_named() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    model, other = nn.Linear(4, 1), nn.Linear(4, 1)
    optimizers = [torch.optim.SGD(each.parameters(), 1e-2) for each in (model, other)]
    model, other, optimizer, idle = accelerator.prepare(model, other, *optimizers)
    accelerator.backward(model(torch.ones(2, 4)).float().sum())
    optimizer.step()
    with pytest.raises(SteppingError, match="SGD was stepped under mixed_precision='fp16', and its parameters have no"):
        idle.step()
