"""Train each rank by itself, and average the weights every few steps."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.local_sgd import LocalSGD
from accelerate.utils import set_seed
from torch.nn import functional as F

from tests.compat.scripts.tables import accuracy, loaders, network, weights_sum


def main(folder: str) -> dict[str, Any]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    set_seed(6)
    train, evaluation = loaders("wine", 160, 25, 4)
    model = network(13, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model, optimizer, train, evaluation = accelerator.prepare(model, optimizer, train, evaluation)
    losses, apart = [], []
    for _ in range(2):
        with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=3, enabled=True) as local_sgd:
            for columns, classes in train:
                with accelerator.accumulate(model):
                    loss = F.cross_entropy(model(columns), classes)
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                    local_sgd.step()
                losses.append(loss.item())
                apart.append(weights_sum(model))
    found = accuracy(accelerator, model, evaluation)
    accelerator.end_training()
    return {"losses": losses, "apart": apart, **found, "weights": weights_sum(model)}
