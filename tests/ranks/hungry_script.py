"""A training in which the last rank alone runs out of memory, forward or backward, after two steps."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from tests.support.trainer import Tagger, batch_plan, run


class ShortOfMemory(torch.autograd.Function):
    """Passes values on, and finds no memory for gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor) -> torch.Tensor:
        """Pass on."""
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        """Find no memory."""
        raise torch.OutOfMemoryError("out of memory in backward")


class Hungry(Tagger):
    """Has memory for two rows only, on the last rank."""

    where = ""
    calls = 0

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Run out after two whole batches."""
        self.calls += self.training
        out = super().forward(input_ids, labels)
        last = os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)
        if not (self.training and last and len(input_ids) > 2 and self.calls > 2):
            return out
        if self.where == "forward":
            raise torch.OutOfMemoryError("out of memory in forward")
        return {**out, "loss": ShortOfMemory.apply(out["loss"])} if self.where == "backward" else out  # type: ignore[no-untyped-call]


def hungry() -> Hungry:
    """The model, the same each time."""
    torch.manual_seed(3)
    return Hungry()


if __name__ == "__main__":
    folder, Hungry.where, changes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    log, trainer = run(changes, folder, make=hungry)
    if trainer.accelerator.is_main_process:
        said = {"log": log, "plan": batch_plan(trainer), "restarts": os.environ["TORCHELASTIC_RESTART_COUNT"]}
        Path(folder, "log.json").write_text(json.dumps(said), encoding="utf-8")
