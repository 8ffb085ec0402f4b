"""What the scripts train on: scikit-learn's tables and small networks with dropout."""

from __future__ import annotations

from typing import Any

import torch
from sklearn import datasets
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset


def table(name: str, rows: int | None = None) -> TensorDataset:
    """The standardized columns and the classes of one of scikit-learn's tables."""
    loaded: Any = getattr(datasets, f"load_{name}")()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(loaded.target), generator=generator)[:rows]
    columns = torch.tensor(loaded.data, dtype=torch.float32)[order]
    columns = (columns - columns.mean(0)) / (columns.std(0) + 1e-6)
    return TensorDataset(columns, torch.tensor(loaded.target)[order])


def halves(dataset: TensorDataset, held_out: int) -> tuple[Subset[Any], Subset[Any]]:
    """All rows but the last ones, and the last ones."""
    kept = len(dataset) - held_out
    return Subset(dataset, range(kept)), Subset(dataset, range(kept, len(dataset)))


def loaders(name: str, rows: int, held_out: int, batch_size: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """A shuffled loader for training and one in order, with a ragged last batch, for evaluation."""
    train, evaluation = halves(table(name, rows), held_out)
    return DataLoader(train, batch_size=batch_size, shuffle=True), DataLoader(evaluation, batch_size=batch_size)


def network(columns: int, classes: int, dropout: float = 0.1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(columns, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, classes))


def weights_sum(model: nn.Module) -> float:
    """One number that any change of a weight changes."""
    total = 0.0
    for number, parameter in enumerate(model.parameters(), start=1):
        total += number * float(parameter.detach().double().sum() + parameter.detach().double().abs().sum())
    return total


def accuracy(accelerator: Any, model: nn.Module, loader: Any) -> dict[str, float]:
    """How many of a loader's samples are right, each counted once."""
    model.eval()
    right = seen = 0
    for columns, classes in loader:
        with torch.no_grad():
            answers = model(columns).argmax(-1)
        answers, classes = accelerator.gather_for_metrics((answers, classes))
        right += int((answers == classes).sum())
        seen += len(classes)
    model.train()
    return {"right": float(right), "seen": float(seen)}
