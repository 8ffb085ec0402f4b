"""Everything about the speed of one GPU in one command: builds, checks losses, measures, and writes the tables.

    python -m benchmarks.gpu.run --rows tests loss input step fsdp launch
    python -m benchmarks.gpu.run --rows several-fsdp several-ddp several-gather    # on all devices of this machine

Each part is a process of its own. The tables are printed, appended to benchmarks/RESULTS.md with hardware and versions,
and written to `--output` with the parts' logs.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
TRAINING = [
    "step",
    "default",
    "fp8",
    "fp8-rowwise",
    "fp8-fsdp",
    "fsdp",
    "fsdp-default",
    "launch",
    "launch-default",
    "memory",
]
TITLES = {
    "step": "Llama 1.26 B, sequence 4096, batch 4",
    "default": "Llama 1.26 B, sequence 4096, batch 4, by default",
    "fp8": "Llama 1.26 B, sequence 4096, batch 4, fp8",
    "fp8-rowwise": "Llama 1.26 B, sequence 4096, batch 4, fp8 by rows",
    "fp8-fsdp": "Llama 1.26 B under FSDP2, fp8",
    "fsdp": "Llama 1.26 B under FSDP2",
    "fsdp-2": "Llama 1.26 B under FSDP2 on two GPUs, batch 4 on each",
    "fsdp-default": "Llama 1.26 B under FSDP2, by default",
    "launch": "Llama 0.37 B, sequence 512, batch 2",
    "memory": "Llama with 8 of its layers under FSDP2: memory against time",
    "launch-ways": "Llama 0.37 B, sequence 512, batch 2: ways to compile",
    "launch-default": "Llama 0.37 B, sequence 512, batch 2, by default",
    "several-fsdp": "Llama 1.26 B, sequence 4096, batch 4 a device, FSDP2",
    "several-fp8": "Llama 1.26 B, sequence 4096, batch 4 a device, FSDP2, fp8",
    "several-zero": "Llama 1.26 B, sequence 4096, batch 4 a device, ZeRO",
    "several-ddp": "Llama 0.37 B, sequence 2048, batch 8 a device, DDP",
    "several-corner": "Llama 1.26 B, sequence 2048, batch 1 a device, FSDP2",
}
GPU_TESTS = {"test-fp8": "tests/gpu/test_fp8.py", "test-waits": "tests/gpu/test_host_waits.py"}
TESTS = [
    "tests/unit/data/test_prefetch.py",
    "tests/unit/data/test_pinning.py",
    "tests/unit/nn",
    "tests/gpu/test_gpu_nn.py",
]


def main() -> int:
    """Run the parts that were chosen, as long as there is time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", nargs="*", default=["loss", "input", "trainer", "packing", *TRAINING], help="parts, in this order"
    )
    parser.add_argument("--minutes", type=float, default=8.5, help="for all parts together")
    parser.add_argument("--part-minutes", type=float, default=4, help="for one part at most")
    parser.add_argument("--output", type=Path, help="folder of the logs and of tables.md")
    args = parser.parse_args()
    end = time.monotonic() + args.minutes * 60
    code = 0
    texts = []
    for part in args.rows:
        left = end - time.monotonic()
        if left < 20:
            print(f"{part}: no time is left", flush=True)
            continue
        found, log, failed = run_part(part, min(left, args.part_minutes * 60))
        code = code or failed
        if args.output:
            args.output.mkdir(parents=True, exist_ok=True)
            (args.output / f"{part}.log").write_text(log, encoding="utf-8")
        if found is not None:
            texts.append(table_of(part, found))
            print(texts[-1], flush=True)
    if texts:
        text = f"\n## Speed on a GPU\n\n{hardware()}\n" + "".join(texts)
        with (ROOT / "benchmarks" / "RESULTS.md").open("a", encoding="utf-8") as file:
            file.write(text)
        if args.output:
            (args.output / "tables.md").write_text(text, encoding="utf-8")
    return code


def run_part(part: str, seconds: float) -> tuple[dict[str, Any] | None, str, int]:
    """Run one part for `seconds` at most; return what it measured, its log, and its exit code."""
    environment = {
        **os.environ,
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "TOKENIZERS_PARALLELISM": "false",
    }
    match part:
        case "tests":
            command = ["-m", "pytest", "-q", "--timeout", "120", "-p", "no:cacheprovider", *TESTS]
        case "test-fp8" | "test-waits":
            command = [
                "-m",
                "pytest",
                "-q",
                "-rP",
                "-W",
                "default",
                "--timeout",
                "200",
                "-p",
                "no:cacheprovider",
                GPU_TESTS[part],
            ]
            command += ["--tb=short", "-x"] if part == "test-fp8" else ["--tb=short"]
        case "compile-tests":
            chosen = ["tests/ranks/test_automatic_compilation.py", "tests/ranks/test_prepare.py"]
            command = ["-m", "pytest", "-q", "--timeout", "120", "-p", "no:cacheprovider", "-k", "compil", *chosen]
            command += ["--show-capture=no", "--tb=short"]
            environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        case "probe" | "probe-hidden":
            command = ["-m", "benchmarks.gpu.compile_probe"]
            environment |= {"OMP_NUM_THREADS": "1"} | ({"CUDA_VISIBLE_DEVICES": ""} if part == "probe-hidden" else {})
        case "loss":
            command = ["-m", "benchmarks.gpu.losses"]
        case "input":
            command = ["-m", "benchmarks.gpu.inputs"]
        case "attention":
            command = ["-m", "benchmarks.gpu.attention"]
        case part if part.startswith("several-"):
            ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "gpu"]
            command = [*ranks, "-m", "benchmarks.gpu.several", part.removeprefix("several-")]
            command += ["--seconds", str(max(10.0, min(150.0, seconds - 40)))]
            environment |= {"OMP_NUM_THREADS": "4"}
        case "input-parts":
            command = ["-m", "benchmarks.gpu.inputs", "--parts"]
        case "trainer" | "packing":
            command = ["-m", "benchmarks.gpu.trainers", part]
        case "fp8-sizes":
            command = ["-m", "benchmarks.gpu.fp8_sizes"]
        case "fsdp-2":
            command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            command += ["-m", "benchmarks.gpu.training", part]
        case _:
            command = ["-m", "benchmarks.gpu.training", part, "--seconds", str(max(10.0, min(150.0, seconds - 25)))]
    started = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
        log, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as error:
        log, code = (error.stdout or b"").decode() if isinstance(error.stdout, bytes) else error.stdout or "", 124
    print(f"--- {part}: exit code {code} after {time.monotonic() - started:.0f} s", flush=True)
    lines = [line for line in log.splitlines() if line.strip()]
    if "test" in part or part.startswith("probe") or code:
        print("\n".join(lines[-60:]), flush=True)
        return None, log, code
    print("\n".join(line for line in lines[:-1] if " warn" not in line.lower())[-3000:], flush=True)
    found: dict[str, Any] = json.loads(next(line for line in reversed(lines) if line.startswith("{")))
    return found, log, code


def hardware() -> str:
    """One line: the device, and the versions that matter."""
    versions = []
    for name in ("transformers", "accelerate", "lightning", "deepspeed", "torchao", "triton"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    day = datetime.datetime.now(tz=datetime.timezone.utc).date()
    python = sys.version.split()[0]
    device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return (
        f"{day}, `python -m benchmarks.gpu.run`, {device}, torch {torch.__version__}, "
        f"Python {python}, {', '.join(versions)}."
    )


def table_of(part: str, found: dict[str, Any]) -> str:
    """A table in Markdown."""
    match part:
        case "loss":
            lines = [
                f"\n### The loss over vocabularies ({found['tokens']:,} tokens of width {found['width']})\n",
                "| vocabulary | way | ms | GiB | loss off by | gradients off by (hidden, weight) |",
                "|--:|---|--:|--:|--:|---|",
            ]
            for row in found["rows"]:
                errors = ", ".join(f"{error:.1e}" for error in row["grad_errors"])
                lines.append(
                    f"| {row['vocabulary']:,} | {row['way']} | {row['ms']:.1f} | {row['gib']:.2f} | "
                    f"{row['loss_gap']:.1e} | {errors} |"
                )
        case "several-gather":
            lines = [
                f"\n### Gathering two small tensors on {found['devices']} devices (equal: {found['equal']})\n",
                "| way | us a call | ratio |",
                "|---|--:|--:|",
                *(f"| {row['contender']} | {row['us']:.0f} | {row['ratio']:.3f} |" for row in found["rows"]),
            ]
        case "input-parts":
            lines = [
                f"\n### Parts of the way of {found['megabytes']:.0f} MB to the device\n",
                "| part | ms | GB/s |",
                "|---|--:|--:|",
                *(f"| {row['contender']} | {row['ms']:.2f} | {row['ratio']:.1f} |" for row in found["rows"]),
            ]
        case "attention":
            lines = [
                "\n### Causal attention, forward and backward\n",
                "| batch, heads, sequence, width | kernel | ms | TFLOP/s |",
                "|---|---|--:|--:|",
                *(
                    f"| {', '.join(map(str, row['shape']))} | {row['way']} | {row['ms']:.3f} | {row['tflops']:.0f} |"
                    for row in found["rows"]
                ),
            ]
        case "fp8-sizes":
            lines = [
                f"\n### Linear layers in fp8, forward and backward of {found['tokens']:,} tokens\n",
                "| outputs | inputs | bf16, ms | by tensor | of bf16 | by row | of bf16 |",
                "|--:|--:|--:|--:|--:|--:|--:|",
                *(
                    f"| {row['rows']:,} | {row['columns']:,} | {row['bf16']:.3f} | {row['tensorwise']:.3f} | "
                    f"{row['tensorwise'] / row['bf16']:.2f} | {row['rowwise']:.3f} | "
                    f"{row['rowwise'] / row['bf16']:.2f} |"
                    for row in found["rows"]
                ),
            ]
        case "trainer":
            lines = [
                "\n### The Trainer and the Accelerator's own loop\n",
                "| loop | ms a step | ratio |",
                "|---|--:|--:|",
                *(f"| {row['contender']} | {row['ms']:.2f} | {row['ratio']:.3f} |" for row in found["rows"]),
            ]
        case "packing":
            lines = [
                f"\n### Packing: {found['samples']:,} functions of Python's library, {found['mean_length']:.0f} bytes "
                "on average\n",
                "| rows | targets/s | ratio | loss |",
                "|---|--:|--:|--:|",
                *(
                    f"| {row['contender']} | {row['tokens_s']:,.0f} | {row['ratio']:.2f} | {row['loss']:.3f} |"
                    for row in found["rows"]
                ),
            ]
        case "input":
            lines = [
                f"\n### Batches of {found['megabytes']:.0f} MB\n",
                "| batches | ms a step | ratio |",
                "|---|--:|--:|",
                *(f"| {row['contender']} | {row['ms']:.2f} | {row['ratio']:.3f} |" for row in found["rows"]),
            ]
        case _:
            lines = [
                f"\n### {TITLES[part]}\n",
                f"{found['parameters'] / 1e9:.2f} B parameters; products at {found['matmul_tflops']:.0f} TFLOP/s; "
                f"{found['rounds']} rounds; {found.get('devices', 1)} device(s).\n",
                "| contender | ms a step | of the first | MFU | GiB | tokens/s | losses off by |",
                "|---|--:|--:|--:|--:|--:|--:|",
                *(
                    f"| {row['contender']} | {row['ms']:.1f} | {row['ratio']:.3f} ({row['spread'][0]:.3f} - "
                    f"{row['spread'][1]:.3f}) | {100 * row['mfu']:.0f} % | {row['gib']:.1f} | {row['tokens_s']:,.0f} | "
                    f"{row['loss_gap']:.1e} |"
                    for row in found["rows"]
                ),
            ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
