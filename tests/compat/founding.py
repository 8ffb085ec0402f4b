"""A program with transformers' Trainer, as people launch it with a configuration file; it knows of no library beneath.

Rank 0 prints one line of JSON behind RESULT: losses, gradient norms, seconds of a step, peak memory.

    accelerate launch --config_file run.yaml founding.py SIZE STEPS
    paceline launch --as_accelerate --config_file run.yaml founding.py SIZE STEPS
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from typing import Any

import torch
import transformers

from tests.compat.texts import Pieces, llama, padded

SIZES: dict[str, dict[str, int]] = {
    "tiny": {},
    # 0.5 billion parameters.
    "large": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 12, "num_attention_heads": 16,
        "num_key_value_heads": 8, "max_position_embeddings": 1024,
    },
}  # fmt: skip


class StepTimes(transformers.TrainerCallback):
    """Seconds of each step, with all that the device does in it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begun = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        _wait_for_device()
        self._begun = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        _wait_for_device()
        self.seconds.append(time.perf_counter() - self._begun)


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(size: str, steps: str) -> None:
    """Train, and print what came of it."""
    model = llama(**SIZES[size])
    longest = 24 if size == "tiny" else 1024
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, max_steps=int(steps), per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=1,
            report_to="none", save_strategy="no", disable_tqdm=True, seed=3,
        )  # fmt: skip
        times = StepTimes()
        trainer = transformers.Trainer(
            model, arguments, data_collator=padded, train_dataset=Pieces(96, longest=longest), callbacks=[times]
        )
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    found = {
        "losses": [entry["loss"] for entry in log],
        "norms": [float(entry["grad_norm"]) for entry in log],
        "seconds": statistics.median(times.seconds[len(times.seconds) // 3 :]),
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0,
        "precision": trainer.accelerator.mixed_precision,
        "type": str(trainer.accelerator.distributed_type),
        "library": type(trainer.accelerator).__module__.partition(".")[0],
        "processes": trainer.accelerator.num_processes,
    }
    if int(os.environ.get("RANK", "0")) == 0:
        print("RESULT", json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
