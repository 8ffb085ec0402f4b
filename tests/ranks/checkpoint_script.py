"""A small training that saves as it goes and resumes by itself; tests start it, kill it and look at what it leaves.

Arguments: folder, strategy, steps, steps between saves, "background" or "blocking"; then optional words:
`evaluate` walks an evaluation loader after each epoch until somebody ends it, `slow` makes each step take longer, and
`linger` each from the ninth on much longer, the first time that the ranks are started.
It appends a line of JSON to `<folder>/log-<rank>` for each step: step, ids, loss.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from paceline import Accelerator, ProjectConfiguration

SAMPLES, BATCH = 48, 4


class Wide(torch.nn.Module):
    """Large enough that saving it takes a while, cheap enough to train on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(20_000, 32)
        self.inner = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Dropout(0.1), torch.nn.Linear(32, 1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(self.table(ids))
        return out.mean()


def main(folder: str, strategy: str, steps: str, every: str, how: str, *words: str) -> None:
    torch.manual_seed(3)
    accelerator = Accelerator(
        cpu=True,
        strategy=strategy,
        project_config=ProjectConfiguration(
            project_dir=folder,
            automatic_checkpoint_naming=True,
            total_limit=2,
            save_in_background=how == "background",
        ),
    )
    torch.manual_seed(3)
    model: Any = Wide()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader: Any = DataLoader(TensorDataset(torch.arange(SAMPLES)), BATCH, shuffle=True)
    evaluation: Any = DataLoader(TensorDataset(torch.arange(400)), BATCH)
    torch.manual_seed(100 + accelerator.process_index)
    model, optimizer, loader, evaluation = accelerator.prepare(model, optimizer, loader, evaluation)
    resumed = accelerator.load_state()
    done = optimizer.num_steps
    with (Path(folder) / f"log-{accelerator.process_index}").open("a") as log:
        log.write(json.dumps({"start": done, "from": resumed, "pid": os.getpid()}) + "\n")
        while done < int(steps):
            for (ids,) in loader:
                if done == int(steps):
                    break
                loss = model(ids)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                done += 1
                log.write(json.dumps({"step": done, "ids": ids.tolist(), "loss": float(loss.detach())}) + "\n")
                log.flush()
                if done % int(every) == 0:
                    accelerator.save_state()
                if "slow" in words:
                    time.sleep(0.05)
                if "linger" in words and done > 8 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                    time.sleep(2)
            if "evaluate" in words and done < int(steps):
                for _ in range(1000):
                    for _ in evaluation:
                        time.sleep(0.05)
    accelerator.wait_for_save()
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        torch.save(weights, Path(folder) / "final.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
