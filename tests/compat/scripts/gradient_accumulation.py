"""Accumulate gradients over micro-batches whose number does not divide an epoch."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.nn import functional as F

from tests.compat.scripts.tables import accuracy, loaders, network, weights_sum


def main(folder: str) -> dict[str, Any]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    set_seed(1)
    train, evaluation = loaders("wine", 120, 23, 4)
    model = network(13, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=40)
    model, optimizer, train, evaluation, scheduler = accelerator.prepare(model, optimizer, train, evaluation, scheduler)
    losses, rates, steps, norms = [], [], [], []
    for _ in range(2):
        for columns, classes in train:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(columns), classes)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 1.0)))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            rates.append(scheduler.get_last_lr()[0])
            steps.append(float(accelerator.sync_gradients))
    found = accuracy(accelerator, model, evaluation)
    accelerator.end_training()
    return {"losses": losses, "rates": rates, "steps": steps, "norms": norms, **found, "weights": weights_sum(model)}
