"""Compress gradients while DDP averages them."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator, DDPCommunicationHookType, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch.nn import functional as F

from tests.compat.scripts.tables import accuracy, loaders, network, weights_sum

HOOKS: dict[str, dict[str, Any]] = {
    "none": {},
    "fp16": {"comm_hook": DDPCommunicationHookType.FP16},
    "power": {
        "comm_hook": DDPCommunicationHookType.POWER_SGD,
        "comm_state_option": {"matrix_approximation_rank": 1, "start_powerSGD_iter": 2},
    },
    "wrapped": {"comm_hook": DDPCommunicationHookType.POWER_SGD, "comm_wrapper": DDPCommunicationHookType.FP16},
}


def main(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, options in HOOKS.items():
        AcceleratorState._reset_state()
        accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(**options)])
        set_seed(10)
        train, evaluation = loaders("wine", 110, 19, 5)
        model = network(13, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        model, optimizer, train, evaluation = accelerator.prepare(model, optimizer, train, evaluation)
        losses = []
        for columns, classes in train:
            loss = F.cross_entropy(model(columns), classes)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        found[name] = {
            "losses": losses,
            **accuracy(accelerator, model, evaluation),
            "weights": weights_sum(accelerator.unwrap_model(model)),
        }
        accelerator.free_memory()
    accelerator.end_training()
    return found
