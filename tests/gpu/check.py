"""Everything that must be seen on accelerators, in one run: tests, the demo, and the cost of a step.

DeepSpeed's part is skipped where it is not installed.

    python tests/gpu/check.py

Prints tables in Markdown; `benchmarks/RESULTS.md` keeps them with the hardware and the versions.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
DEMO = ["--steps", "200", "--width", "512", "--layers", "8", "--heads", "8", "--context", "512", "--lr", "1e-3"]
LAUNCHES = {
    "1 device": ["--num_processes", "1"],
    "1 device, bf16": ["--num_processes", "1", "--mixed_precision", "bf16"],
    "1 device, fp16": ["--num_processes", "1", "--mixed_precision", "fp16"],
    "all devices": [],
    "all devices, bf16": ["--mixed_precision", "bf16"],
    "all devices, FSDP2": ["--use_fsdp"],
    "all devices, FSDP2, bf16": ["--use_fsdp", "--mixed_precision", "bf16"],
    "all devices, FSDP2, fp16": ["--use_fsdp", "--mixed_precision", "fp16"],
    "all devices, ZeRO-2, bf16": ["--use_deepspeed", "--zero_stage", "2", "--mixed_precision", "bf16"],
    "all devices, ZeRO-3, bf16": ["--use_deepspeed", "--zero_stage", "3", "--mixed_precision", "bf16"],
}


def main() -> int:
    """Run what was asked for; the exit code is that of the tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip", nargs="*", default=[], choices=["tests", "demo", "overhead", "deepspeed"])
    parser.add_argument("--demos", default="", help="only the launches whose name ends so")
    args = parser.parse_args()
    skip = args.skip
    count = torch.accelerator.device_count()
    print(f"{count} x {torch.cuda.get_device_name()}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    code = 0 if "tests" in skip else run_tests()
    if "demo" not in skip:
        print_demos(count, args.demos)
    if "overhead" not in skip:
        run([sys.executable, "benchmarks/step_overhead.py"], show=True)
    if "deepspeed" not in skip and count > 1:
        run([sys.executable, "benchmarks/deepspeed.py"], show=True)
    return code


def run_tests() -> int:
    """Run the tests that need devices."""
    chosen = ["tests/gpu", "tests/unit/data/test_prefetch.py"]
    return run([sys.executable, "-m", "pytest", "-q", "--durations=5", *chosen], show=True)[0]


def print_demos(count: int, only: str) -> None:
    """Run the language model in every way, in one table."""
    print("\n| launch | validation loss | tokens/s | peak GB a rank | seconds |\n|---|---|--:|--:|--:|")
    for name, flags in LAUNCHES.items():
        absent = "ZeRO" in name and importlib.util.find_spec("deepspeed") is None
        if absent or (name.startswith("all") and count < 2) or not name.endswith(only):
            continue
        started = time.perf_counter()
        command = [sys.executable, "-m", "paceline", "launch", *flags, "examples/language_model.py", *DEMO]
        code, text = run([*command, "--output", "/tmp/language_model"])
        loss = re.search(r"validation loss: (.*) nats", text)
        speed = re.findall(r"([\d,]+) tokens/s, ([\d.]+) GB", text)
        if code or not loss or not speed:
            print(f"| {name} | failed ({code}) | | | |\n{text[-3000:]}")
            continue
        print(
            f"| {name} | {loss[1]} | {speed[-1][0]} | {speed[-1][1]} | {time.perf_counter() - started:.0f} |",
            flush=True,
        )


def run(command: list[str], *, show: bool = False) -> tuple[int, str]:
    """Run a command in the project's root; return its exit code and what it printed."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if show:
        print(done.stdout, flush=True)
    return done.returncode, done.stdout


if __name__ == "__main__":
    sys.exit(main())
