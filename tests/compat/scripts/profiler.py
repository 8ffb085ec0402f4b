"""Profile a few steps; training is the same as without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProfileKwargs, set_seed
from torch.nn import functional as F

from tests.compat.scripts.tables import loaders, network, weights_sum


def main(folder: str) -> dict[str, Any]:
    handled: list[int] = []
    settings = ProfileKwargs(
        activities=["cpu"],
        schedule_option={"wait": 1, "warmup": 1, "active": 2, "repeat": 1, "skip_first": 0},
        on_trace_ready=lambda profiler: handled.append(len(profiler.key_averages()) > 0),
        record_shapes=True,
        output_trace_dir=None,
    )
    accelerator = Accelerator(cpu=True, kwargs_handlers=[settings])
    set_seed(9)
    train, _ = loaders("wine", 100, 10, 6)
    model = network(13, 3)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.01)
    model, optimizer, train = accelerator.prepare(model, optimizer, train)
    losses = []
    with accelerator.profile() as profiler:
        for columns, classes in train:
            loss = F.cross_entropy(model(columns), classes)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            profiler.step()
            losses.append(loss.item())
    with accelerator.profile(ProfileKwargs(activities=["cpu"], output_trace_dir=folder)):
        model(columns)
    traces = sorted(path.name for path in Path(folder).glob("profile_*.json"))
    accelerator.end_training()
    return {"losses": losses, "handled": handled, "traces": traces, "weights": weights_sum(model)}
