"""A training that keeps ever more, on a process that may have half a GiB more than it has at its third step."""

from __future__ import annotations

import resource
import sys

import psutil
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from paceline import Accelerator


def main(kind: str) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model: nn.Module = nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 512))
    loader = DataLoader(TensorDataset(torch.randn(64, 512)), batch_size=8)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters()), loader)
    kept: list[object] = []
    for number, (inputs,) in enumerate(loader):
        with accelerator.accumulate(model):
            accelerator.backward(model(inputs).sum())
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        if number == 2:
            limit = psutil.Process().memory_info().vms + 2**29
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        while number > 2:
            kept.append(torch.ones(2**24) if kind == "tensor" else bytearray(2**26))  # no more


if __name__ == "__main__":
    main(sys.argv[1])
