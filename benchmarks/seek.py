"""How long the first batch takes after a resume at 1 %, 50 % and 90 % of an epoch.

    python benchmarks/seek.py

A shuffled map-style data set of 10^6 samples that are cheap to read, or take `--read-us` each. Compares paceline with
Accelerate's `skip_first_batches` and torchdata's `StatefulDataLoader`, where they are installed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset

from paceline import Accelerator

if TYPE_CHECKING:
    from collections.abc import Callable

PLACES = (0.01, 0.5, 0.9)


class Numbers(Dataset[int]):
    """Yields its indices, each after `seconds`."""

    def __init__(self, size: int, seconds: float) -> None:
        self.size = size
        self.seconds = seconds

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        if self.seconds:
            time.sleep(self.seconds)
        return index


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000, help="samples per epoch (default: 1000000)")
    parser.add_argument("--batch", type=int, default=100, help="samples per batch (default: 100)")
    parser.add_argument("--read-us", type=float, default=0.0, help="microseconds to read a sample (default: 0)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements per contender (default: 5)")
    args = parser.parse_args()
    data = Numbers(args.samples, args.read_us / 1e6)
    ways: dict[str, Callable[[Numbers, int, int], float]] = {"paceline": with_paceline}
    if find_spec("accelerate"):
        ways["Accelerate skip_first_batches"] = with_accelerate
    if find_spec("torchdata"):
        ways["torchdata StatefulDataLoader"] = with_torchdata
    times: dict[tuple[str, float], list[float]] = {}
    for _ in range(args.rounds):
        for name, way in ways.items():
            for place in PLACES:
                batches = int(args.samples * place) // args.batch
                times.setdefault((name, place), []).append(way(data, args.batch, batches))
    print(
        f"{args.samples:,} samples, batches of {args.batch}, {args.read_us:g} us per sample, torch {torch.__version__}"
    )
    print("\n| seconds until the first batch, median | 1 % | 50 % | 90 % |\n|---|--:|--:|--:|")
    for name in ways:
        print(f"| {name} | " + " | ".join(f"{statistics.median(times[name, place]):.3f}" for place in PLACES) + " |")


def seconds_to_first(loader: Any) -> float:
    """Return how long the first batch takes."""
    began = time.perf_counter()
    next(iter(loader))
    return time.perf_counter() - began


def with_paceline(data: Numbers, size: int, batches: int) -> float:
    """Load a position."""
    loader = Accelerator(cpu=True).prepare(DataLoader(data, size, shuffle=True))
    state = loader.state_dict()
    loader.load_state_dict({**state, "samples": batches * size, "batches": batches})
    return seconds_to_first(loader)


def with_accelerate(data: Numbers, size: int, batches: int) -> float:
    """Skip batches with `skip_first_batches`."""
    from accelerate import Accelerator as Theirs

    accelerator = Theirs(cpu=True)
    loader = accelerator.prepare(DataLoader(data, size, shuffle=True))
    return seconds_to_first(accelerator.skip_first_batches(loader, batches))


def with_torchdata(data: Numbers, size: int, batches: int) -> float:
    """Load a state that was saved at this position."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    before = StatefulDataLoader(Numbers(data.size, 0.0), size, shuffle=True)
    state: dict[str, Any] = {}
    for number, _ in enumerate(before, 1):
        if number == batches:
            state = before.state_dict()
            break
    loader = StatefulDataLoader(data, size, shuffle=True)
    loader.load_state_dict(state)
    return seconds_to_first(loader)


if __name__ == "__main__":
    main()
