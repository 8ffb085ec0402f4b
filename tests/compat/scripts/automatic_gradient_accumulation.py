"""Shrink the batch until it fits in memory, and accumulate what is missing to the batch that was asked for."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size, set_seed
from torch.nn import functional as F

from tests.compat.scripts.tables import accuracy, loaders, network, weights_sum

WANTED = 16
FITS = 4


def main(folder: str) -> dict[str, Any]:
    accelerator = Accelerator(cpu=True)
    found: dict[str, Any] = {"sizes": []}

    @find_executable_batch_size(starting_batch_size=WANTED, reduce_batch_size_fn=lambda: _halve(found["sizes"]))  # type: ignore[untyped-decorator]
    def run(batch_size: int) -> None:
        found["sizes"].append(batch_size)
        accelerator.free_memory()
        if batch_size > FITS:
            raise RuntimeError("CUDA out of memory. Tried to allocate a lot.")
        accelerator.gradient_accumulation_steps = WANTED // batch_size
        set_seed(2)
        train, evaluation = loaders("digits", 200, 29, batch_size)
        model = network(64, 10)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model, optimizer, train, evaluation = accelerator.prepare(model, optimizer, train, evaluation)
        found["losses"] = []
        for columns, classes in train:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(columns), classes)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            found["losses"].append(loss.item())
        found.update(accuracy(accelerator, model, evaluation), weights=weights_sum(model))

    run()
    found["steps"] = accelerator.gradient_accumulation_steps
    accelerator.end_training()
    return found


def _halve(sizes: list[int]) -> int:
    return sizes[-1] // 2
