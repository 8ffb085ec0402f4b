"""The same scripts with transformers' Trainer and with ours; run as a program it is transformers' turn."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

STEPS = 50
CASES: dict[str, dict[str, Any]] = {
    "linear": {"lr_scheduler_type": "linear", "warmup_steps": 5},
    "cosine": {"lr_scheduler_type": "cosine"},
    "linear, 4 micro-batches": {"lr_scheduler_type": "linear", "gradient_accumulation_steps": 4},
    "cosine, 4 micro-batches": {
        "lr_scheduler_type": "cosine",
        "gradient_accumulation_steps": 4,
        "warmup_steps": 0.1,
    },
}


class Texts(Dataset[dict[str, torch.Tensor]]):
    """Rows of tokens; in training rows, the last few have no label."""

    def __init__(self, size: int, seed: int, *, holes: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(0, 53, (size, 12), generator=generator)
        self.known = torch.randint(3, 13, (size,), generator=generator)
        self.holes = holes

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        labels = self.tokens[index].clone()
        if self.holes:
            labels[self.known[index] :] = -100
        return {"input_ids": self.tokens[index], "labels": labels}


def right(prediction: Any) -> dict[str, float]:
    answers, labels = prediction.predictions.argmax(-1)[:, :-1], prediction.label_ids[:, 1:]
    return {"right": float((answers == labels).mean()), "samples": float(len(labels))}


def train(package: str, case: dict[str, Any], folder: str) -> list[dict[str, float]]:
    """Train one case, and return the log."""
    from transformers import LlamaConfig, LlamaForCausalLM

    library = importlib.import_module(package)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=53,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )
    arguments = library.TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=3,
        per_device_eval_batch_size=4,
        learning_rate=5e-3,
        weight_decay=0.1,
        train_sampling_strategy="sequential",
        eval_strategy="steps",
        eval_steps=20,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
        **case,
    )
    trainer = library.Trainer(
        model=model,
        args=arguments,
        train_dataset=Texts(30, 1, holes=True),
        eval_dataset=Texts(24, 2, holes=False),
        compute_metrics=right,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return [dict(entry) for entry in trainer.state.log_history]


def ours(folder: str) -> dict[str, list[dict[str, float]]]:
    """Every case with our Trainer."""
    return {name: train("paceline", case, folder) for name, case in CASES.items()}


if __name__ == "__main__":
    logs = {name: train("transformers", case, sys.argv[1]) for name, case in CASES.items()}
    if int(os.environ.get("RANK", "0")) == 0:
        Path(sys.argv[1], "logs.json").write_text(json.dumps(logs), encoding="utf-8")
