"""Stop all ranks when one of them has seen enough."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.nn import functional as F

from tests.compat.scripts.tables import accuracy, loaders, network, weights_sum


def main(folder: str) -> dict[str, Any]:
    accelerator = Accelerator(cpu=True)
    set_seed(5)
    train, evaluation = loaders("digits", 220, 35, 8)
    model = network(64, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    model, optimizer, train, evaluation = accelerator.prepare(model, optimizer, train, evaluation)
    losses = []
    for _ in range(20):
        for columns, classes in train:
            loss = F.cross_entropy(model(columns), classes)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            # Each rank has its own loss: whichever is there first stops the others.
            if loss.item() < 0.7:
                accelerator.set_trigger()
            if accelerator.check_trigger():
                break
        else:
            continue
        break
    found = accuracy(accelerator, model, evaluation)
    accelerator.end_training()
    return {"losses": losses, **found, "weights": weights_sum(model)}
