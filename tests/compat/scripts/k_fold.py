"""Choose a learning rate by its mean score over folds, with a sampler that depends on the seed alone."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from sklearn.model_selection import KFold
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from tests.compat.scripts.tables import accuracy, network, table, weights_sum


def main(folder: str) -> dict[str, Any]:
    configuration = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=12)
    accelerator = Accelerator(cpu=True, dataloader_config=configuration, step_scheduler_with_optimizer=False)
    rows = table("breast_cancer", 150)
    found: dict[str, Any] = {}
    for rate in (0.1, 0.01):
        scores, losses, weights = [], [], []
        for train_rows, valid_rows in KFold(3).split(range(len(rows))):
            set_seed(12)
            train: Any = DataLoader(Subset(rows, train_rows.tolist()), batch_size=9, shuffle=True)
            valid: Any = DataLoader(Subset(rows, valid_rows.tolist()), batch_size=9)
            model: Any = network(30, 2, dropout=0.3)
            optimizer: Any = torch.optim.SGD(model.parameters(), lr=rate)
            scheduler: Any = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            model, optimizer, train, valid, scheduler = accelerator.prepare(model, optimizer, train, valid, scheduler)
            for epoch in range(2):
                train.set_epoch(epoch)
                for columns, targets in train:
                    loss = F.cross_entropy(model(columns), targets)
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                    losses.append(loss.item())
                scheduler.step()
            counted = accuracy(accelerator, model, valid)
            scores.append(counted["right"] / counted["seen"])
            weights.append([weights_sum(model), scheduler.get_last_lr()[0]])
            accelerator.clear()
        found[str(rate)] = {"score": sum(scores) / len(scores), "losses": losses, "weights": weights}
    accelerator.end_training()
    return found
