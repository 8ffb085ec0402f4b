"""Count every sample of a ragged evaluation once, as tensors and as objects, whichever way the loader was read."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import gather_object, pad_across_processes, set_seed
from torch.utils.data import DataLoader

from tests.compat.scripts.tables import network, table

LOADERS: dict[str, dict[str, Any]] = {
    "default": {},
    "split": {"split_batches": True},
    "dispatch": {"dispatch_batches": True},
    "dispatch and split": {"dispatch_batches": True, "split_batches": True},
}


def main(folder: str) -> dict[str, Any]:
    set_seed(8)
    model = network(13, 3)
    found: dict[str, Any] = {}
    for name, settings in [*LOADERS.items(), ("drop", {})]:
        accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**settings))
        model.eval()
        loader = accelerator.prepare(DataLoader(table("wine", 61), batch_size=6, drop_last=name == "drop"))
        outputs, objects, scalars = [], [], []
        for columns, classes in loader:
            logits = model(columns)
            outputs.append(accelerator.gather_for_metrics({"logits": logits, "classes": classes}))
            objects += accelerator.gather_for_metrics([f"class {int(one)}" for one in classes], use_gather_object=True)
            scalars.append(accelerator.gather(logits.sum()).tolist())
        found[name] = {
            "seen": [len(output["classes"]) for output in outputs],
            "logits": float(sum(output["logits"].sum() for output in outputs)),
            "classes": [output["classes"].tolist() for output in outputs],
            "objects": objects,
            "scalars": scalars,
        }
    rank = accelerator.process_index
    ragged = torch.arange(rank + 2)
    padded = pad_across_processes(ragged, pad_index=-1)
    with accelerator.split_between_processes(list(range(5))) as mine:
        shared = gather_object([sum(mine)])
    found["padded"] = accelerator.gather(padded).tolist()
    found["shared"] = shared
    found["reduced"] = accelerator.reduce({"a": torch.tensor([1.0 + rank])}, "mean")["a"].tolist()
    accelerator.end_training()
    return found
