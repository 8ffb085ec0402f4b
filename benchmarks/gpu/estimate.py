"""What `paceline estimate` says against what a run takes: torch's peak, of a Llama under bf16 with AdamW.

    python -m benchmarks.gpu.estimate

0.37 B and 1.26 B parameters, on one device and under FSDP2, with and without activation checkpointing; eager, with all
logits. Each run is a process of its own. Prints a table, and JSON in the last line; exits with 1 where an estimate is
off by more than 10 %.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from typing import Any

import torch

CASES: dict[str, dict[str, Any]] = {
    "0.37 B, sequence 2048, batch 4": {"layers": 24, "width": 1024, "inner": 2816, "heads": 16, "sequence": 2048},
    "1.26 B, sequence 4096, batch 4": {"layers": 22, "width": 2048, "inner": 5632, "heads": 32, "sequence": 4096},
}
BATCH = 4
STEPS = 3
WAYS = [("single", False), ("single", True), ("fsdp", False), ("fsdp", True)]
LIMIT = 0.10


def configuration(case: dict[str, Any]) -> Any:
    """The model of a case."""
    from transformers import LlamaConfig

    build: Any = LlamaConfig
    return build(
        architectures=["LlamaForCausalLM"],
        vocab_size=32_000,
        hidden_size=case["width"],
        intermediate_size=case["inner"],
        num_hidden_layers=case["layers"],
        num_attention_heads=case["heads"],
        num_key_value_heads=case["heads"],
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )


def train(name: str, strategy: str, checkpointing: bool) -> None:
    """Take a few steps in this process, and print the peak."""
    from transformers import LlamaForCausalLM

    from paceline import Accelerator, FullyShardedDataParallelPlugin, TorchDynamoPlugin

    case = CASES[name]
    build: Any = LlamaForCausalLM
    with torch.device("cuda"):
        model = build(configuration(case))
    settings: dict[str, Any] = {"strategy": strategy}
    if strategy == "fsdp":
        settings["fsdp_plugin"] = FullyShardedDataParallelPlugin(activation_checkpointing=checkpointing)
    elif checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    accelerator = Accelerator(mixed_precision="bf16", dynamo_plugin=TorchDynamoPlugin(backend="no"), **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    tokens = torch.randint(32_000, (BATCH, case["sequence"]), device="cuda")
    model.train()
    for step in range(STEPS):
        if step == 1:
            torch.cuda.reset_peak_memory_stats()
        with accelerator.accumulate(model):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    print(json.dumps({"peak": torch.cuda.max_memory_allocated()}), flush=True)
    os._exit(0)


def run(name: str, strategy: str, checkpointing: bool) -> int:
    """Train in a process of its own; return the peak."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        port = listener.getsockname()[1]
    world = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    arguments = ["--case", name, "--strategy", strategy, *(["--checkpointing"] if checkpointing else [])]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.estimate", *arguments],
        env={**os.environ, **world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return int(json.loads(done.stdout.strip().splitlines()[-1])["peak"])


def estimate(name: str) -> dict[tuple[str, bool], int]:
    """What `paceline estimate` says of each way."""
    import tempfile
    from dataclasses import replace

    from paceline.cli.estimate import Device, Estimate
    from paceline.cli.model_source import model_source
    from paceline.planner.estimation import Layout

    case = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        configuration(case).save_pretrained(folder)
        source = model_source(folder, None, case["sequence"])
    settings = {"mixed_precision": "bf16", "optimizer": "adamw_fused", "gradient_accumulation_steps": 1}
    whole = Estimate(source, (1,), Device.of(80 * 2**30), {**settings, "batch_size": BATCH})
    layouts = {way: replace(Layout(name="", strategy=way[0]), checkpointing=way[1]) for way in WAYS}
    return {way: whole.estimator.training(layout, 1, BATCH).peak for way, layout in layouts.items()}


def main() -> None:
    """Compare, or take the steps of one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES))
    parser.add_argument("--strategy", choices=["single", "fsdp"])
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--estimate_only", action="store_true", help="print the estimates; needs no GPU")
    args = parser.parse_args()
    if args.case:
        train(args.case, args.strategy, args.checkpointing)
    rows = []
    offs: list[float] = []
    print("| model | way | estimate GiB | run GiB | off by |\n|---|---|--:|--:|--:|", flush=True)
    for name in CASES:
        started = time.perf_counter()
        estimates = estimate(name)
        seconds = time.perf_counter() - started
        for (strategy, checkpointing), estimated in estimates.items():
            measured = estimated if args.estimate_only else run(name, strategy, checkpointing)
            off = estimated / measured - 1
            way = f"{strategy}{', checkpointing' if checkpointing else ''}"
            print(f"| {name} | {way} | {estimated / 2**30:.2f} | {measured / 2**30:.2f} | {off:+.1%} |", flush=True)
            offs.append(off)
            rows.append({"case": name, "way": way, "estimate": estimated, "run": measured, "off": off})
        print(f"{name}: estimated in {seconds:.0f} s", file=sys.stderr, flush=True)
    print(json.dumps(rows), flush=True)
    sys.exit(int(any(abs(off) > LIMIT for off in offs)))


if __name__ == "__main__":
    main()
