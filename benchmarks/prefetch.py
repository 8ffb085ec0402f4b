"""How well the copy of a batch to the device overlaps with the step before it.

    python benchmarks/prefetch.py

Large batches, and a step of matrix products that takes about as long as the copy. Compares data that is already on the
device, the prefetcher of prepared loaders, and copies on the compute stream, blocking and non-blocking, in one run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import TYPE_CHECKING

import torch

from paceline.data import DevicePrefetcher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=117, help="size of a batch (default: 117)")
    parser.add_argument("--steps", type=int, default=50, help="steps per block (default: 50)")
    parser.add_argument("--rounds", type=int, default=9, help="blocks per contender (default: 9)")
    args = parser.parse_args()
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        sys.exit("This benchmark needs an accelerator; there is none here.")
    pageable = torch.randn(args.megabytes * 250, 1000)
    pinned = pageable.pin_memory()
    on_device = pinned.to(device)
    weight = torch.randn(1000, 1000, device=device)
    prefetcher = DevicePrefetcher(device, non_blocking=True)
    ways: dict[str, Callable[[], Iterable[Tensor]]] = {
        "already on the device": lambda: repeated(on_device, args.steps),
        "prefetcher, pinned": lambda: prefetcher.iterate(repeated(pinned, args.steps)),
        "prefetcher, pageable": lambda: prefetcher.iterate(repeated(pageable, args.steps)),
        "compute stream, pinned, non_blocking": lambda: moved(repeated(pinned, args.steps), device, True),
        "compute stream, pinned": lambda: moved(repeated(pinned, args.steps), device, False),
        "compute stream, pageable": lambda: moved(repeated(pageable, args.steps), device, False),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds + 1):
        for name, batches in ways.items():
            times[name].append(measure(batches(), weight) / args.steps * 1000)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; batches of {pageable.nbytes / 1e6:.0f} MB")
    print("\n| batches | ms per step, median | quartiles |\n|---|--:|--:|")
    for name, found in times.items():
        low, middle, high = statistics.quantiles(found[1:], n=4)
        print(f"| {name} | {middle:.2f} | {low:.2f} - {high:.2f} |")


def repeated(batch: Tensor, times: int) -> Iterator[Tensor]:
    """Yield one batch repeatedly."""
    return iter([batch] * times)


def moved(batches: Iterator[Tensor], device: torch.device, non_blocking: bool) -> Iterator[Tensor]:
    """Copy each batch when it is requested, on the compute stream."""
    return (batch.to(device, non_blocking=non_blocking) for batch in batches)


def measure(batches: Iterable[Tensor], weight: Tensor) -> float:
    """Return the seconds that one step per batch takes."""
    torch.accelerator.synchronize()
    started = time.perf_counter()
    for batch in batches:
        total = batch
        for _ in range(3):
            total = total @ weight
    torch.accelerator.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
