"""A training whose last rank has little memory: its activations fit at 4 rows, not at 8."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from tests.support.trainer import IGNORED, Tagger, batch_plan, run

LIMIT = 5.5 * 2**30


class Wide(Tagger):
    """Holds about 0.8 GiB of activations for each row."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Say something about each token, with 1,024 copies of it."""
        hidden = self.tokens(input_ids).repeat_interleave(1024, 1)
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(hidden.unflatten(1, (-1, 1024)).mean(2))
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)}


def wide() -> Wide:
    """The model, the same each time."""
    torch.manual_seed(3)
    return Wide(1024, 4)


if __name__ == "__main__":
    folder, limited, changes = sys.argv[1], sys.argv[2] == "limited", json.loads(sys.argv[3])
    rank = int(os.environ["LOCAL_RANK"])
    if limited and rank == int(os.environ["LOCAL_WORLD_SIZE"]) - 1:
        whole = torch.cuda.get_device_properties(rank).total_memory
        torch.cuda.set_per_process_memory_fraction(LIMIT / whole, rank)
    log, trainer = run(changes, folder, make=wide)
    if trainer.accelerator.is_main_process:
        said = {"log": log, "plan": batch_plan(trainer), "restarts": os.environ["TORCHELASTIC_RESTART_COUNT"]}
        Path(folder, "log.json").write_text(json.dumps(said), encoding="utf-8")
