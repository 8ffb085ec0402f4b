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


# When something is due by steps and by passes, with accumulation, and flags that a callback raises.
FLOWS: dict[str, dict[str, Any]] = {
    "by steps": {"gradient_accumulation_steps": 2, "logging_steps": 2, "eval_steps": 3, "save_steps": 4},
    "by passes": {"logging_strategy": "epoch", "eval_strategy": "epoch", "save_strategy": "epoch", "eval_delay": 2},
    "the best": {
        "eval_steps": 2,
        "save_strategy": "best",
        "metric_for_best_model": "right",
        "logging_first_step": True,
    },
    "at the start": {"eval_on_start": True, "eval_steps": 0.5, "logging_steps": 0.3},
}
FLAGS = ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log")


def recorder(base: type[Any], events: list[Any], *, may_save: bool) -> Any:
    """A callback that writes down each event with the step and the flags, and asks for things at times.

    Args:
        base: The library's class of callbacks.
        events: Grows.
        may_save: Whether it asks for a save as well. transformers drops that where only the best is saved.
    """

    def note(name: str) -> Any:
        def event(_self: Any, _args: Any, state: Any, control: Any, **_things: Any) -> None:
            raised = [flag for flag in FLAGS if getattr(control, flag)]
            events.append([name, state.global_step, round(float(state.epoch or 0), 6), raised])
            if (name, state.global_step) == ("on_step_end", 5):
                control.should_evaluate = control.should_epoch_stop = True
            if (name, state.global_step) == ("on_evaluate", 5) and may_save:
                control.should_save = True
            if (name, state.global_step) == ("on_log", 13):
                control.should_training_stop = True

        return event

    names = [name for name in dir(base) if name.startswith("on_")]
    return type("Recorder", (base,), {name: note(name) for name in names})()


def flows(package: str, folder: str) -> dict[str, list[Any]]:
    """The events of every flow."""
    library = importlib.import_module(package)
    found: dict[str, list[Any]] = {}
    for name, case in FLOWS.items():
        events = found[name] = []
        said = {"save_strategy": "steps", "save_steps": 5, **case, "max_steps": 15}
        callback = recorder(library.TrainerCallback, events, may_save=said["save_strategy"] != "best")
        train(package, said, str(Path(folder, package, name)), callbacks=[callback])
    return found


def train(package: str, case: dict[str, Any], folder: str, **more: Any) -> list[dict[str, float]]:
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
    said = {
        "output_dir": folder,
        "max_steps": STEPS,
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 4,
        "learning_rate": 5e-3,
        "weight_decay": 0.1,
        "train_sampling_strategy": "sequential",
        "eval_strategy": "steps",
        "eval_steps": 20,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "ddp_backend": "gloo" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
    }
    arguments = library.TrainingArguments(**{**said, **case})
    trainer = library.Trainer(
        model=model,
        args=arguments,
        train_dataset=Texts(30, 1, holes=True),
        eval_dataset=Texts(24, 2, holes=False),
        compute_metrics=right,
        **more,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return [dict(entry) for entry in trainer.state.log_history]


def cases(package: str, folder: str) -> dict[str, Any]:
    """The log of every case."""
    return {name: train(package, case, folder) for name, case in CASES.items()}


WHAT = {"cases": cases, "flows": flows}

if __name__ == "__main__":
    found = WHAT[sys.argv[1]]("transformers", sys.argv[2])
    if int(os.environ.get("RANK", "0")) == 0:
        Path(sys.argv[2], "found.json").write_text(json.dumps(found), encoding="utf-8")
    # transformers leaves its process group open, and now and then a process aborts because gloo's threads still run
    # while Python ends.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
