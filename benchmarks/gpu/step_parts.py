"""Where the time of a step goes: kernels by kind on the device, and phases on the host.

    python -m benchmarks.gpu.step_parts default      # the contenders of `benchmarks.gpu.training`
    python -m benchmarks.gpu.step_parts launch --only "raw, blocks compiled, loss compiled"

The host's time of a phase is what it takes to queue its kernels, without waiting for the device. If the phases together
take as long as a step, the host is the limit.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections import defaultdict
from itertools import pairwise
from typing import Any

import torch
from benchmarks.gpu.training import Contender, batches_of, contenders_of, open_group, synchronized, warm_up

STEPS = 5
PHASES = ("forward", "backward", "clip", "step", "zero_grad")
# The first pattern that a kernel's name contains says what it is.
KINDS = {
    "attention": r"fmha|flash|attention|sdpa|cudnn_generated",
    "products": r"gemm|nvjet|cutlass|xmma|_mm_|scaled_mm|wgmma",
    "optimizer": r"adam|multi_tensor|foreach|FusedAdam",
    "collectives": r"nccl|split_with_sizes|chunk_cat",
    "loss": r"cross_entropy|log_softmax|nll_loss",
    "compiled pointwise": r"triton_",
    "copies and fills": r"Memcpy|Memset|copy|fill",
    "other pointwise": r"elementwise|reduce|vectorized",
}


def device_parts(contender: Contender, batches: list[Any]) -> dict[str, float]:
    """Milliseconds of a step on the device, by kind of kernel."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for index in range(STEPS):
            contender.step(batches[index % len(batches)])
        torch.cuda.synchronize()
    spent: defaultdict[str, float] = defaultdict(float)
    names: defaultdict[str, float] = defaultdict(float)
    for event in profile.events():
        if event.device_type.name != "CUDA":
            continue
        milliseconds = event.device_time_total / 1000 / STEPS
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, event.name, re.I)), "rest")
        spent[kind] += milliseconds
        names[f"{kind}: {event.name[:110]}"] += milliseconds
    for name in sorted(names, key=lambda one: -names[one])[:16]:
        print(f"    {names[name]:7.2f} ms  {name}")
    return dict(sorted(spent.items(), key=lambda one: -one[1]))


def host_parts(contender: Contender, batches: list[Any]) -> dict[str, float]:
    """Milliseconds of a step on the host, by phase, and of a whole step."""
    model, optimizer = contender.model, contender.optimizer
    parameters = list(model.parameters())
    spent: defaultdict[str, float] = defaultdict(float)
    for index in range(STEPS):
        torch.cuda.synchronize()
        marks = [time.perf_counter()]
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(batches[index % len(batches)])
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        marks.append(time.perf_counter())
        optimizer.step()
        marks.append(time.perf_counter())
        optimizer.zero_grad()
        marks.append(time.perf_counter())
        for name, (start, end) in zip(PHASES, pairwise(marks), strict=True):
            spent[name] += (end - start) * 1000 / STEPS
    spent["a whole step"] = synchronized(lambda: [contender.step(batches[0]) for _ in range(STEPS)]) / STEPS * 1000
    return dict(spent)


def main() -> None:
    """Print both for every contender of a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--only", nargs="*", help="titles of contenders")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("There is no GPU here.")
    if "fsdp" in args.name:
        open_group()
    for contender in contenders_of(args.name):
        if args.only and contender.title not in args.only:
            continue
        batches = batches_of(contender.case)
        print(f"{contender.title}, built in {warm_up(contender, batches):.0f} s", flush=True)
        contender.begin()
        host_parts(contender, batches)
        on_host = host_parts(contender, batches)
        print("  host, ms:  ", ", ".join(f"{name} {taken:.1f}" for name, taken in on_host.items()), flush=True)
        on_device = device_parts(contender, batches)
        parts = ", ".join(f"{kind} {taken:.1f}" for kind, taken in on_device.items())
        print(f"  device, ms: {parts}, together {sum(on_device.values()):.1f}", flush=True)
        contender.end()
        contender.model = contender.optimizer = contender.accelerator = None
        torch.cuda.empty_cache()
    os._exit(0)


if __name__ == "__main__":
    main()
