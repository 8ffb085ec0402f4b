"""The Trainer against the Accelerator's own loop, and packed against padded rows of real text.

    python -m benchmarks.gpu.trainers trainer
    python -m benchmarks.gpu.trainers packing

Contenders train one after the other, in several rounds; the first steps of each do not count. The text is the source of
Python's standard library, cut at its functions, as bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import statistics
import sys
import tempfile
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from benchmarks.gpu.training import MEDIUM, make_model
from tests.support.text import standard_library
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from paceline import Accelerator, Trainer, TrainerCallback, TrainingArguments

if TYPE_CHECKING:
    from collections.abc import Callable

WARM = 12
LENGTH = 1024


class Stopwatch(TrainerCallback):
    """Seconds from one step to the last."""

    def __init__(self) -> None:
        self.started = self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **things: Any) -> None:
        if state.global_step == WARM:
            torch.cuda.synchronize()
            self.started = time.perf_counter()
        elif state.global_step == state.max_steps:
            torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.started


class Counting(Trainer):
    """Counts the targets of the steps that are measured, on the device."""

    targets: Any = 0

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        if self.state.global_step >= WARM:
            self.targets = self.targets + inputs["labels"].ne(-100).sum()
        return super().training_step(model, inputs, num_items_in_batch)


def arguments(folder: str, steps: int, batch: int, **more: Any) -> TrainingArguments:
    """Those of all runs."""
    settings: dict[str, Any] = {"learning_rate": 1e-4, "save_strategy": "no", "report_to": "none", "log_level": "error"}
    return TrainingArguments(
        output_dir=folder,
        bf16=True,
        max_steps=steps,
        per_device_train_batch_size=batch,
        disable_tqdm=True,
        logging_steps=1000,
        **settings,
        **more,
    )


def train(kind: type[Trainer], model: Any, data: Any, collator: Any, **settings: Any) -> tuple[float, Any]:
    """Seconds of the steps that are measured, and the Trainer."""
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = kind(model, arguments(folder, **settings), collator, train_dataset=data, callbacks=[watch])
        trainer.train()
    trainer.accelerator.free_memory()
    return watch.seconds, trainer


# The Trainer and the facade


def rows() -> list[dict[str, torch.Tensor]]:
    """Random tokens."""
    tokens = torch.randint(MEDIUM.vocabulary, (64, 2048), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def by_facade(steps: int, batch: int) -> float:
    """Milliseconds of a step in a loop of one's own."""
    accelerator = Accelerator(mixed_precision="bf16")
    model: Any = make_model(MEDIUM, "dense").model
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    schedule: Any = LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
    loader: Any = DataLoader(rows(), batch_size=batch, shuffle=True)  # type: ignore[arg-type]
    model, optimizer, schedule, loader = accelerator.prepare(model, optimizer, schedule, loader)
    parameters = list(model.parameters())
    done = 0
    started = 0.0
    while done < steps:
        for inputs in loader:
            with accelerator.accumulate(model):
                loss = model(**inputs).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            done += 1
            if done == WARM:
                torch.cuda.synchronize()
                started = time.perf_counter()
            if done == steps:
                break
    torch.cuda.synchronize()
    found = (time.perf_counter() - started) / (steps - WARM) * 1000
    accelerator.free_memory()
    return found


def by_trainer(steps: int, batch: int) -> float:
    """The same through the Trainer, with the model's own loss."""
    model = make_model(MEDIUM, "dense").model
    seconds, _ = train(Trainer, model, rows(), None, steps=steps, batch=batch, chunked_loss=False)
    return seconds / (steps - WARM) * 1000


def compare_trainers(rounds: int) -> dict[str, Any]:
    """Milliseconds of a step, and their ratio."""
    # Whether to compile is the same decision in both; without it, rounds are short.
    os.environ["PACELINE_DYNAMO_BACKEND"] = "no"
    ways: dict[str, Callable[[], float]] = {
        "the Accelerator's own loop": partial(by_facade, 40, 4),
        "the same, again": partial(by_facade, 40, 4),
        "Trainer": partial(by_trainer, 40, 4),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(way())
            torch.cuda.empty_cache()
    first = times["the Accelerator's own loop"]
    table = [
        {
            "contender": name,
            "ms": statistics.median(found),
            "ratio": statistics.median(one / other for one, other in zip(found, first, strict=True)),
        }
        for name, found in times.items()
    ]
    return {"name": "trainer", "rows": table}


# Packing


def functions() -> list[dict[str, torch.Tensor]]:
    """Functions and classes of the standard library as bytes, cut to `LENGTH`."""
    found = []
    for text in standard_library(6_000_000):
        for part in re.split(rb"\n(?=def |class |    def )", text):
            if len(part) > 16:
                tokens = torch.frombuffer(bytearray(part[:LENGTH]), dtype=torch.uint8).long()
                found.append({"input_ids": tokens, "labels": tokens})
    return found


def padded(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch padded to its longest sample."""
    tokens = [sample["input_ids"] for sample in samples]
    mask = pad_sequence([torch.ones_like(one) for one in tokens], batch_first=True)
    return {
        "input_ids": pad_sequence(tokens, batch_first=True),
        "labels": pad_sequence(tokens, batch_first=True, padding_value=-100),
        "attention_mask": mask,
    }


def compare_packing(rounds: int) -> dict[str, Any]:
    """Targets a second of padded and packed rows."""
    data = functions()
    ways: dict[str, dict[str, Any]] = {
        "padded, 32 sequences": {"batch": 32, "collator": padded},
        "padded, sorted by length": {"batch": 32, "collator": padded, "train_sampling_strategy": "group_by_length"},
        f"packed, 16 rows of {LENGTH}": {"batch": 16, "collator": None, "packing": True, "packing_length": LENGTH},
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    losses: dict[str, float] = {}
    for _ in range(rounds):
        for name, settings in ways.items():
            model = make_model(MEDIUM, "dense").model
            more = dict(settings)
            seconds, trainer = train(Counting, model, data, more.pop("collator"), steps=60, **more)
            rates[name].append(float(trainer.targets) / seconds)
            losses[name] = trainer.state.log_history[-1]["train_loss"]
            torch.cuda.empty_cache()
    first = rates["padded, 32 sequences"]
    table = [
        {
            "contender": name,
            "tokens_s": statistics.median(found),
            "ratio": statistics.median(one / other for one, other in zip(found, first, strict=True)),
            "loss": losses[name],
        }
        for name, found in rates.items()
    ]
    mean = sum(len(sample["input_ids"]) for sample in data) / len(data)
    return {"name": "packing", "samples": len(data), "mean_length": mean, "rows": table}


def main() -> None:
    """Measure one table, and print it as JSON in the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["trainer", "packing"])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("There is no GPU here.")
    found = compare_trainers(args.rounds) if args.name == "trainer" else compare_packing(args.rounds)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
