"""What a step costs one rank as the number of ranks grows, with collectives that do nothing.

    python -m benchmarks.world_size --sizes 1 8 64 512 4096
    python -m benchmarks.world_size --plot benchmarks/world_size.svg    # needs matplotlib

Each number of ranks is a process of its own, which is rank 0 of a world that torch's fake process group makes up: what
is left is what this process does itself. The same loop by hand, in DistributedDataParallel and `fully_shard`, shows
what of it is torch's. The least of many blocks of steps is shown, the calls of functions in a step, which no other load
changes, and the milliseconds of `prepare`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[1]
SIZES = [1, 8, 64, 512, 4096]
STRATEGIES = ["ddp", "ddp by hand", "fsdp", "fsdp by hand"]


def measure(strategy: str, size: int) -> dict[str, Any]:
    """Steps of a small model in a world of `size` ranks."""
    import torch
    import torch.distributed as dist
    from tests.support.calls import count_calls
    from torch import nn
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from torch.utils.data import Dataset

    os.environ.update(RANK="0", WORLD_SIZE=str(size), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    # The made-up group has no store for the watchdog.
    os.environ.update(GROUP_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29400", PACELINE_HANG_TIMEOUT="0")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)

    class Samples(Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return 4_000_000

        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.ones(64)

    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    make_loop = by_hand if strategy.endswith("by hand") else through_paceline
    step, prepared = make_loop(strategy.partition(" ")[0], model, Samples(), size)
    for _ in range(10):
        step()
    calls = count_calls(step)
    times = []
    for _ in range(12):
        before = time.process_time()
        for _ in range(10):
            step()
        times.append((time.process_time() - before) / 10 * 1e6)
    return {"strategy": strategy, "size": size, "us": min(times), "calls": calls, "prepare_ms": prepared * 1000}


def through_paceline(strategy: str, model: Any, data: Any, size: int) -> tuple[Callable[[], None], float]:
    """The loop of the facade, and the seconds of `prepare`."""
    import torch
    from torch.utils.data import DataLoader

    from paceline import Accelerator

    accelerator = Accelerator(cpu=True, strategy=strategy)
    optimizer: Any = torch.optim.AdamW(model.parameters())
    loader: Any = DataLoader(data, batch_size=4, shuffle=True)
    started = time.perf_counter()
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    prepared = time.perf_counter() - started
    if strategy == "ddp":
        # The made-up group returns nothing where DDP expects the sum.
        model.register_comm_hook(None, _unchanged)
    parameters = list(model.parameters())
    batches = iter(loader)

    def step() -> None:
        with accelerator.accumulate(model):
            loss = model(next(batches)).pow(2).mean()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return step, prepared


def by_hand(strategy: str, model: Any, data: Any, size: int) -> tuple[Callable[[], None], float]:
    """The same loop in plain PyTorch, and the seconds of wrapping the model."""
    import torch
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader, DistributedSampler

    started = time.perf_counter()
    if strategy == "ddp":
        model = DistributedDataParallel(model)
        model.register_comm_hook(None, _unchanged)
    else:
        # As paceline does by default: gathered again in the backward.
        fully_shard(model, reshard_after_forward=True)
    prepared = time.perf_counter() - started
    optimizer = torch.optim.AdamW(model.parameters())
    sampler: Any = DistributedSampler(data, size, 0)
    batches = iter(DataLoader(data, batch_size=4, sampler=sampler))
    parameters = list(model.parameters())

    def step() -> None:
        loss = model(next(batches)).pow(2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, prepared


def _unchanged(_state, bucket):  # type: ignore[no-untyped-def]
    # DDP checks annotations, where there are any.
    import torch

    done: Any = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw the calls and the time of a step against the number of ranks."""
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axes, key, label in ((left, "calls", "calls a step"), (right, "us", "us of processor time a step")):
        for strategy in dict.fromkeys(row["strategy"] for row in rows):
            points = [(row["size"], row[key]) for row in rows if row["strategy"] == strategy]
            axes.plot(*zip(*points, strict=True), marker="o", label=strategy)
        axes.set(xscale="log", yscale="log", xlabel="ranks", ylabel=label)
        axes.legend()
    figure.savefig(file)


def main() -> int:
    """Measure all, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    parser.add_argument("--strategies", nargs="*", default=STRATEGIES)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the table, too; needs matplotlib")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib, which is not installed: pip install matplotlib")
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]))), flush=True)
        # Threads of the made-up group have nothing to end.
        os._exit(0)
    print("| strategy | ranks | us of processor time a step | calls a step | ms of prepare |\n|---|--:|--:|--:|--:|")
    rows = []
    for strategy in args.strategies:
        for size in args.sizes:
            command = [sys.executable, "-m", "benchmarks.world_size", "--one", strategy, str(size)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode:
                print(done.stderr[-2000:], file=sys.stderr)
                return 1
            row = json.loads(done.stdout.splitlines()[-1])
            rows.append(row)
            print(
                f"| {strategy} | {size:,} | {row['us']:.0f} | {row['calls']:,} | {row['prepare_ms']:.0f} |", flush=True
            )
    if args.plot is not None:
        plot(rows, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
