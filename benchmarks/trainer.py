"""The cost of a step under the Trainer, a hand-written loop and transformers' Trainer, in one interleaved run.

    python benchmarks/trainer.py --rounds 7 --steps 120
    python benchmarks/trainer.py --accumulation 4 --width 512 --layers 8 --device cuda

All contenders train the same Llama on the same rows in memory, in fp32, with AdamW, clipping, a linear schedule and a
log entry every 50 steps. On a CPU the process's own CPU time is measured. The first steps of each round do not count.
transformers' Trainer is included where transformers and accelerate are installed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

if TYPE_CHECKING:
    from collections.abc import Callable

WARM = 20
LOGGING = 50
ROWS = 64
VOCABULARY = 64


def build(args: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=args.width,
            intermediate_size=2 * args.width,
            num_hidden_layers=args.layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            use_cache=False,
        )
    )


def rows(args: argparse.Namespace) -> list[dict[str, torch.Tensor]]:
    drawn = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (ROWS * args.batch, args.length), generator=drawn)
    return [{"input_ids": row, "labels": row} for row in tokens]


def by_hand(args: argparse.Namespace) -> float:
    model = build(args).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    scheduler = LambdaLR(optimizer, lambda step: max(0.0, 1 - step / args.steps))
    loader: Any = DataLoader(rows(args), args.batch, shuffle=True)  # type: ignore[arg-type]
    parameters = list(model.parameters())
    model.train()
    done = window = 0
    begun = 0.0
    total = torch.zeros((), device=args.device)
    while done < args.steps:
        for batch in loader:
            on_device = {name: value.to(args.device, non_blocking=True) for name, value in batch.items()}
            loss = model(**on_device).loss / args.accumulation
            loss.backward()
            total += loss.detach()
            window += 1
            if window % args.accumulation:
                continue
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            done += 1
            if done % LOGGING == 0:
                total.item()
            if done == WARM:
                begun = now(args.device)
            if done == args.steps:
                break
    return (now(args.device) - begun) / float(args.steps - WARM)


def with_trainer(package: str, args: argparse.Namespace) -> float:
    library = importlib.import_module(package)
    marks: list[float] = []

    class Clock(library.TrainerCallback):  # type: ignore[name-defined,misc]
        def on_step_end(self, _args: Any, state: Any, control: Any, **things: Any) -> None:
            if state.global_step in (WARM, args.steps):
                marks.append(now(args.device))

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = library.Trainer(
            model=build(args),
            args=library.TrainingArguments(
                output_dir=folder,
                max_steps=args.steps,
                per_device_train_batch_size=args.batch,
                gradient_accumulation_steps=args.accumulation,
                learning_rate=1e-3,
                logging_steps=LOGGING,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=args.device == "cpu",
            ),
            train_dataset=rows(args),
            callbacks=[Clock()],
        )
        trainer.train()
    return (marks[1] - marks[0]) / float(args.steps - WARM)


def now(device: str) -> float:
    if device != "cpu":
        torch.accelerator.synchronize()
    # On a busy machine CPU time is more reliable than wall time.
    return time.process_time() if device == "cpu" else time.perf_counter()


def ways() -> dict[str, Callable[[argparse.Namespace], float]]:
    found: dict[str, Callable[[argparse.Namespace], float]] = {
        "hand-written loop": by_hand,
        "paceline Trainer": lambda args: with_trainer("paceline", args),
    }
    try:
        importlib.import_module("accelerate")
    except ImportError:
        print("transformers' Trainer needs accelerate, which is not installed")
    else:
        found["transformers Trainer"] = lambda args: with_trainer("transformers", args)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    # benchmarks/deepspeed.py would be imported in place of the package.
    here = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != here]
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in ways()}
    for _ in range(args.rounds):
        for name, measure in ways().items():
            times[name].append(measure(args) * 1e3)
    least = min(times["hand-written loop"])
    for name, measured in times.items():
        middle = statistics.median(measured)
        over = min(measured) - least
        print(f"{name:<22} {middle:8.3f} ms per step (median), {min(measured):8.3f} (min), {over:+7.3f} over the loop")
    print(json.dumps({name: [round(value, 4) for value in measured] for name, measured in times.items()}))


if __name__ == "__main__":
    main()
