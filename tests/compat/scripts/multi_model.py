"""Train two models with two optimizers in one loop: a generator of columns against the network that tells them."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.nn import functional as F

from tests.compat.scripts.tables import loaders, network, weights_sum


def main(folder: str) -> dict[str, Any]:
    accelerator = Accelerator(cpu=True)
    # Each rank makes columns of its own.
    set_seed(7, device_specific=False)
    train, _ = loaders("wine", 130, 30, 5)
    maker: nn.Module = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 13))
    judge: nn.Module = network(13, 2)
    maker_optimizer: Any = torch.optim.Adam(maker.parameters(), lr=0.01)
    judge_optimizer: Any = torch.optim.SGD(judge.parameters(), lr=0.05)
    maker, judge, maker_optimizer, judge_optimizer, train = accelerator.prepare(
        maker, judge, maker_optimizer, judge_optimizer, train
    )
    set_seed(70, device_specific=True)
    losses = []
    for _ in range(2):
        for columns, _classes in train:
            made = maker(torch.randn(len(columns), 4))
            genuine = torch.ones(len(columns), dtype=torch.long)
            told = judge(torch.cat([columns, made.detach()]))
            judge_loss = F.cross_entropy(told, torch.cat([genuine, 1 - genuine]))
            accelerator.backward(judge_loss)
            judge_optimizer.step()
            judge_optimizer.zero_grad()
            maker_loss = F.cross_entropy(judge(made), genuine)
            accelerator.backward(maker_loss)
            maker_optimizer.step()
            maker_optimizer.zero_grad()
            judge_optimizer.zero_grad()
            losses.append([judge_loss.item(), maker_loss.item()])
    gathered = accelerator.gather(torch.tensor([losses[-1]]))
    accelerator.end_training()
    return {"losses": losses, "last": gathered.tolist(), "maker": weights_sum(maker), "judge": weights_sum(judge)}
