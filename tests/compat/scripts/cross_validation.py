"""Train once per fold, and let the models of all folds vote on rows that none has seen."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.model_selection import StratifiedKFold
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from tests.compat.scripts.tables import accuracy, halves, network, table, weights_sum


def main(folder: str) -> dict[str, Any]:
    accelerator = Accelerator(cpu=True)
    seen, unseen = halves(table("wine"), 33)
    classes = [int(seen[row][1]) for row in range(len(seen))]
    test: Any = accelerator.prepare(DataLoader(unseen, batch_size=8))
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    found: dict[str, Any] = {"folds": []}
    votes = []
    for fold, (train_rows, valid_rows) in enumerate(folds.split(classes, classes)):
        set_seed(11 + fold)
        train: Any = DataLoader(Subset(seen, train_rows.tolist()), batch_size=8, shuffle=True, drop_last=True)
        valid: Any = DataLoader(Subset(seen, valid_rows.tolist()), batch_size=8)
        model: Any = network(13, 3)
        optimizer: Any = torch.optim.Adam(model.parameters(), lr=0.02)
        model, optimizer, train, valid = accelerator.prepare(model, optimizer, train, valid)
        losses = []
        for columns, targets in train:
            loss = F.cross_entropy(model(columns), targets)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        scores = accuracy(accelerator, model, valid)
        model.eval()
        with torch.no_grad():
            votes.append(torch.cat([accelerator.gather_for_metrics(model(columns)) for columns, _ in test]))
        found["folds"].append({"losses": losses, **scores, "weights": weights_sum(model)})
        model, optimizer, train, valid = accelerator.free_memory(model, optimizer, train, valid)
    answers = torch.stack(votes).mean(0).argmax(-1)
    expected = torch.tensor([int(unseen[row][1]) for row in range(len(unseen))])
    accelerator.end_training()
    return {**found, "voted": len(answers), "right": int((answers == expected).sum())}
