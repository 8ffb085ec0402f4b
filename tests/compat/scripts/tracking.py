"""Log to a tracker of the script's own, and to TensorBoard's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, on_main_process
from accelerate.utils import set_seed
from torch.nn import functional as F

from tests.compat.scripts.tables import accuracy, loaders, network, weights_sum


class Notebook(GeneralTracker):  # type: ignore[misc]
    """Keeps what is logged."""

    name = "notebook"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Any] = []

    @property
    def tracker(self) -> list[Any]:
        return self.entries

    @on_main_process  # type: ignore[untyped-decorator]
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.entries.append(["configuration", dict(values)])

    @on_main_process  # type: ignore[untyped-decorator]
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.entries.append([step, dict(values)])


def main(folder: str) -> dict[str, Any]:
    notebook = Notebook()
    accelerator = Accelerator(cpu=True, log_with=[notebook, "tensorboard"], project_dir=folder)
    set_seed(4)
    train, evaluation = loaders("breast_cancer", 160, 27, 8)
    model = network(30, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model, optimizer, train, evaluation = accelerator.prepare(model, optimizer, train, evaluation)
    accelerator.init_trackers("tables", config={"lr": 0.05, "name": "sgd"})
    step = 0
    for epoch in range(2):
        total = torch.zeros(())
        for columns, classes in train:
            loss = F.cross_entropy(model(columns), classes)
            total += loss.detach()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        mean = accelerator.reduce(total / len(train), reduction="mean")
        accelerator.log({"loss": mean.item(), "epoch": epoch, **accuracy(accelerator, model, evaluation)}, step=step)
    accelerator.end_training()
    events = len(list(Path(folder, "tables").rglob("events.out.tfevents.*"))) > 0
    return {"entries": notebook.entries, "has_events": events, "weights": weights_sum(model)}
