"""Save in the middle of an epoch, and continue from there in a second life."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from torch.nn import functional as F

from tests.compat.scripts.tables import accuracy, loaders, network, weights_sum


class Life:
    """A training run, from the start or from a checkpoint."""

    def __init__(self, folder: str) -> None:
        project = ProjectConfiguration(project_dir=folder, automatic_checkpoint_naming=True, total_limit=2)
        self.accelerator = Accelerator(cpu=True, project_config=project)
        set_seed(3)
        train, evaluation = loaders("wine", 150, 21, 6)
        model = network(13, 3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.5)
        prepared = self.accelerator.prepare(model, optimizer, train, evaluation, scheduler)
        self.model, self.optimizer, self.train, self.evaluation, self.scheduler = prepared
        self.seen = Counter()
        self.accelerator.register_for_checkpointing(self.seen)

    def step(self, batch: Any) -> float:
        columns, classes = batch
        loss = F.cross_entropy(self.model(columns), classes)
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_value_(self.model.parameters(), 0.5)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.seen.samples += len(classes)
        return loss.item()


class Counter:
    """An object of the script's that is saved along."""

    samples = 0

    def state_dict(self) -> dict[str, int]:
        return {"samples": self.samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.samples = state["samples"]


def main(folder: str) -> dict[str, Any]:
    first = Life(folder)
    losses = []
    for epoch in range(2):
        first.train.set_epoch(epoch)
        for number, batch in enumerate(first.train):
            losses.append(first.step(batch))
            if number in (1, 4):
                first.accelerator.save_state()
    names = sorted(path.name for path in Path(folder, "checkpoints").iterdir())
    straight = weights_sum(first.accelerator.unwrap_model(first.model))
    first.accelerator.wait_for_everyone()
    first.accelerator.free_memory()

    second = Life(folder)
    second.accelerator.load_state(str(Path(folder, "checkpoints", names[-1])))
    second.train.set_epoch(1)
    resumed = [second.step(batch) for batch in second.accelerator.skip_first_batches(second.train, 5)]
    found = accuracy(second.accelerator, second.model, second.evaluation)
    second.accelerator.end_training()
    return {
        "losses": losses,
        "names": names,
        "straight": straight,
        "resumed": resumed,
        "samples": second.seen.samples,
        **found,
        "weights": weights_sum(second.accelerator.unwrap_model(second.model)),
    }
