"""Steps on large batches from ordinary and pinned loaders, against batches that are on the device already.

    python -m benchmarks.gpu.inputs

A batch has 113 MB, and a step of matrix products takes about 3.5 ms, as in the other measurements of this project. The
loader yields a tensor that exists already, so what is measured is the way to the device, not reading; workers make
theirs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from benchmarks.gpu.training import synchronized
from torch.utils.data import DataLoader, Dataset

from paceline import Accelerator
from paceline.data.pinning import StagedCopier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

# So many that the first batch, which nothing hides, counts for little.
STEPS = 120
ROWS, COLUMNS = 28_250, 1000


class Rows(Dataset["Tensor"]):
    """Batches that workers make, each in memory of its own."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((ROWS, COLUMNS), float(index))


class Repeated(Dataset["Tensor"]):
    """A few batches, again and again."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> Tensor:
        return self.batches[index % len(self.batches)]


def contenders(workers: bool) -> dict[str, Callable[[], Iterable[Any]]]:
    """Each returns the batches of one turn, on the device; with `workers`, also those that worker processes make."""
    pageable = [torch.randn(ROWS, COLUMNS) for _ in range(4)]
    pinned = [batch.pin_memory() for batch in pageable]
    there = [batch.cuda() for batch in pageable]
    ordinary = DataLoader(Repeated(pageable), batch_size=None)
    accelerator = Accelerator()
    loaders = {
        "paceline, pinned": accelerator.prepare(DataLoader(Repeated(pinned), batch_size=None)),
        "paceline, ordinary DataLoader": accelerator.prepare(DataLoader(Repeated(pageable), batch_size=None)),
    }
    found: dict[str, Callable[[], Iterable[Any]]] = {
        "on the device already": lambda: (there[i % 4] for i in range(STEPS)),
        "by hand, ordinary DataLoader": lambda: (batch.cuda(non_blocking=True) for batch in ordinary),
        **{name: partial(iter, loader) for name, loader in loaders.items()},
    }
    try:
        from accelerate import Accelerator as Other

        other = Other().prepare(DataLoader(Repeated(pageable), batch_size=None))
        found["Accelerate, ordinary DataLoader"] = lambda: other
    except Exception as error:  # It is compared with where it works.
        print(f"Accelerate: {error}", flush=True)
    if workers:
        # At most this fast do workers hand batches over: one process makes and sends 113 MB.
        working = DataLoader(Rows(40), batch_size=None, num_workers=8, prefetch_factor=4, persistent_workers=True)
        found["by hand, 8 workers"] = lambda: (batch.cuda(non_blocking=True) for batch in working)
        found["paceline, 8 workers"] = partial(iter, accelerator.prepare(working))
    found["described"] = lambda: [loaders["paceline, ordinary DataLoader"].describe()]
    return found


def parts() -> list[dict[str, Any]]:
    """Milliseconds of each part of the way of one batch to the device, and gigabytes a second."""
    pageable = [torch.randn(ROWS, COLUMNS) for _ in range(4)]
    pinned = [batch.pin_memory() for batch in pageable]
    target = torch.empty(ROWS, COLUMNS, device="cuda")
    found: dict[str, Callable[[Tensor], Any]] = {
        "pinned to the device": lambda _: target.copy_(pinned[0], non_blocking=True),
        "pageable to the device, by the driver": target.copy_,
        "Tensor.pin_memory": lambda batch: batch.pin_memory(),
        "a copy in host memory, one thread": lambda batch: np.copyto(pinned[0].numpy(), batch.numpy()),
    }
    stream = torch.Stream(device="cuda")
    copiers = []
    for mebibytes in (4, 8, 16, 32):
        copier = StagedCopier(torch.device("cuda", 0), stream, 8, buffer_bytes=mebibytes * 2**20)
        copiers.append(copier)
        found[f"staged in 3 buffers of {mebibytes} MiB"] = partial(_on, stream, copier.copy)
    found["staged by 8 threads of its own"] = partial(_with_torch_threads, 1, partial(_on, stream, copiers[2].copy))
    rows = []
    for name, copy in found.items():
        times = []
        for turn in range(4):
            times.append(synchronized(partial(_several, copy, pageable)) / 8 * 1000)
            if turn == 0:
                times.clear()
        best = min(times)
        rows.append({"contender": name, "ms": best, "ratio": pageable[0].nbytes / best / 1e6})
        print(f"{name}: {best:.2f} ms, {pageable[0].nbytes / best / 1e6:.1f} GB/s", flush=True)
    for copier in copiers:
        copier.close()
    return rows


def _on(stream: torch.Stream, copy: Callable[[Tensor], Any], batch: Tensor) -> None:
    with stream:
        copy(batch)


def _with_torch_threads(count: int, copy: Callable[[Tensor], Any], batch: Tensor) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    copy(batch)
    torch.set_num_threads(before)


def _several(copy: Callable[[Tensor], Any], batches: list[Tensor]) -> None:
    for batch in batches * 2:
        copy(batch)


def main() -> None:
    """Measure, and print JSON in the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--parts", action="store_true", help="what the way to the device is made of")
    parser.add_argument("--workers", action="store_true", help="also batches of worker processes")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("There is no GPU here.")
    if args.parts:
        megabytes = ROWS * COLUMNS * 4 / 1e6
        print(json.dumps({"name": "input-parts", "megabytes": megabytes, "rows": parts()}), flush=True)
        return
    ways = contenders(args.workers)
    describe = ways.pop("described")
    weight = torch.randn(COLUMNS, COLUMNS, device="cuda")

    def train_on(way: Callable[[], Iterable[Any]], seen: list[None]) -> None:
        for batch in way():
            seen.append(None)
            total = batch
            for _ in range(3):
                total = total @ weight

    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds + 1):
        for name, way in ways.items():
            seen: list[None] = []
            seconds = synchronized(partial(train_on, way, seen))
            times[name].append(seconds / len(seen) * 1000)
    print(next(iter(describe())), flush=True)
    first = times["on the device already"][1:]
    rows = [
        {
            "contender": name,
            "ms": statistics.median(found[1:]),
            "ratio": statistics.median(one / other for one, other in zip(found[1:], first, strict=True)),
            "all_ms": [round(one, 2) for one in found],
        }
        for name, found in times.items()
    ]
    print(json.dumps({"name": "input", "megabytes": ROWS * COLUMNS * 4 / 1e6, "rows": rows}), flush=True)


if __name__ == "__main__":
    main()
