"""What the same few lines compute with Accelerate and with paceline: the rows of the README's table without times.

    torchrun --nproc-per-node 4 benchmarks/semantics.py paceline
    torchrun --nproc-per-node 4 benchmarks/semantics.py accelerate

On CPUs. The first two cases run on each rank by itself, the others on all ranks together.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, TensorDataset


def main() -> None:
    """Run every case with the library named on the command line."""
    library = import_module(sys.argv[1])
    results = {
        "gradients with an accumulation of 4 over 5 micro-batches of gradient 1": windows(library),
        "gradient of micro-batches of 1 and 9 tokens, relative to one batch": tokens(library),
        "LinearLR over 100 steps ends at optimizer step": schedule(library),
        "one scalar per rank, gathered on the last batch": scalars(library),
    }
    if library.Accelerator(cpu=True).is_main_process:
        for case, result in results.items():
            print(f"{sys.argv[1]:<12} {case}: {result}")


def windows(library: Any) -> list[float]:
    """The gradient at each optimizer step when the last window has one micro-batch instead of four."""
    accelerator = library.Accelerator(cpu=True, gradient_accumulation_steps=4)
    model: Any = nn.Linear(1, 1, bias=False)
    data = DataLoader(TensorDataset(torch.ones(5 * accelerator.num_processes, 1)), batch_size=1)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0), data)
    seen = []
    for (x,) in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(x).mean())
            if accelerator.sync_gradients:
                seen.append(round(float(accelerator.unwrap_model(model).weight.grad), 4))
            optimizer.step()
            optimizer.zero_grad()
    return seen


def tokens(library: Any) -> float:
    """One micro-batch of one token with gradient 10, one of nine with gradient 1: 1.9 in a batch of all ten."""
    accelerator = library.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model: Any = nn.Linear(1, 1, bias=False)
    model = accelerator.prepare(model)
    for x in (torch.full((1, 1), 10.0), torch.ones(9, 1)):
        with accelerator.accumulate(model):
            losses = model(x)
            if library.__name__ == "paceline":
                accelerator.backward(losses.sum(), weight=losses.numel())
            else:
                accelerator.backward(losses.mean())
    return round(float(accelerator.unwrap_model(model).weight.grad) / 1.9, 4)


def schedule(library: Any) -> int:
    """The optimizer step at which the schedule ends."""
    accelerator = library.Accelerator(cpu=True)
    model: Any = nn.Linear(1, 1)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler: Any = LinearLR(optimizer, start_factor=1.0, end_factor=1e-9, total_iters=100)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    for step in range(1, 101):
        accelerator.backward(model(torch.ones(1, 1)).sum())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if scheduler.get_last_lr()[0] < 1e-6:
            return step
    return -1


def scalars(library: Any) -> list[int]:
    """Each rank passes its number while the last, incomplete batch is in use."""
    accelerator = library.Accelerator(cpu=True)
    size = accelerator.num_processes
    loader = accelerator.prepare(DataLoader(TensorDataset(torch.arange(4 * size + 1)), batch_size=2))
    gathered = torch.empty(0)
    for _ in loader:
        gathered = accelerator.gather_for_metrics(torch.tensor(accelerator.process_index))
    return gathered.tolist()


if __name__ == "__main__":
    main()
