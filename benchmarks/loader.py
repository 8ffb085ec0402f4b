"""The cost of a prepared loader relative to a hand-written one, measured within one run.

    python benchmarks/loader.py                # map-style data, streams on one and two ranks, dispatching, resuming
    python benchmarks/loader.py --rounds 30    # more rounds
    python benchmarks/loader.py --processes 2  # two ranks only

Two gloo processes; samples of 16 floats in batches of 8. The contenders take turns in the same processes, in rotating
order. Each pass is divided by the hand-written pass of the same round; the table has the median ratio, and the CPU time
per sample (all threads of all ranks). The hand-written loader runs twice: the distance of the second from 1.00 shows
the noise.

The hand-written loaders are a `DistributedSampler` for map-style data, a data set that yields every n-th item for
streams, and a `dist.scatter` of each batch for dispatching. No pass includes a training step, so the ratios are upper
bounds.

Resuming is timed until the first batch after 90 % of a stream whose samples take 50 microseconds each; the two batches
that are read (one is read ahead) account for 0.8 ms. Median of nine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import socket
import statistics
import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn as spawn_ranks
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

FLOATS = 16
BATCH = 8
WORLD_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
Pass = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Setting:
    """What the ranks need to know."""

    samples: int
    rounds: int
    processes: int
    accelerate: bool
    port: int = 0


class Table(Dataset[Tensor]):
    """Map-style rows."""

    def __init__(self, samples: int) -> None:
        self.rows = torch.randn(1024, FLOATS)
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index % 1024]


class Stream(IterableDataset[Tensor]):
    """The same rows as a stream: every `step`-th, starting with `first`."""

    def __init__(self, samples: int, first: int = 0, step: int = 1) -> None:
        self.rows = list(torch.randn(1024, FLOATS))
        self.samples, self.first, self.step = samples, first, step

    def __iter__(self) -> Iterator[Tensor]:
        items = (self.rows[index % 1024] for index in range(self.samples))
        return islice(items, self.first, None, self.step)


class SlowStream(IterableDataset[int]):
    """A stream whose items each take some time to produce."""

    def __init__(self, samples: int, seconds: float, start: int = 0) -> None:
        self.samples, self.seconds, self.start = samples, seconds, start

    def __iter__(self) -> Iterator[int]:
        for item in range(self.start, self.samples):
            until = time.perf_counter() + self.seconds
            while time.perf_counter() < until:
                pass
            yield item


class SkippingStream(SlowStream):
    """A slow stream that can skip items."""

    def skip(self, items: int) -> SkippingStream:
        """Return the rest."""
        return SkippingStream(self.samples, self.seconds, self.start + items)


class StatefulStream(SlowStream):
    """A slow stream whose position can be saved."""

    position = 0

    def __iter__(self) -> Iterator[int]:
        for item in SlowStream(self.samples, self.seconds, self.position):
            self.position += 1
            yield item
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        """Return the position."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a saved position."""
        self.position = state["position"]


class Scattered:
    """Batches that rank 0 reads and scatters, written by hand."""

    def __init__(self, loader: Iterable[Tensor], rank: int, size: int) -> None:
        self.loader, self.rank, self.size = loader, rank, size

    def __iter__(self) -> Iterator[Tensor]:
        has_more = torch.ones(1, dtype=torch.int64)
        if self.rank == 0:
            for batch in self.loader:
                dist.broadcast(has_more, 0)
                mine = torch.empty(BATCH, FLOATS)
                dist.scatter(mine, list(batch.chunk(self.size)), 0)
                yield mine
            dist.broadcast(has_more.zero_(), 0)
            return
        while True:
            dist.broadcast(has_more, 0)
            if not has_more.item():
                return
            mine = torch.empty(BATCH, FLOATS)
            dist.scatter(mine, None, 0)
            yield mine


def contenders(setting: Setting, rank: int) -> dict[str, dict[str, Callable[[], Iterable[Any]]]]:
    """Return the contenders of each part; the first is hand-written."""
    from paceline import Accelerator, DataLoaderConfiguration

    size, samples = setting.processes, setting.samples
    plain, dispatching = (
        Accelerator(cpu=True),
        Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=True)),
    )
    table, stream = Table(samples), Stream(samples)
    sampler: DistributedSampler[Any] = DistributedSampler(table, size, rank, shuffle=True)
    by_hand = {
        "map-style": DataLoader(table, BATCH, sampler=sampler),
        "stream": DataLoader(Stream(samples, rank, size), BATCH),
        "dispatch": Scattered(DataLoader(stream, BATCH * size), rank, size),
    }
    prepared = {
        "map-style": plain.prepare(DataLoader(table, BATCH, shuffle=True)),
        "stream": plain.prepare(DataLoader(stream, BATCH)),
        "dispatch": dispatching.prepare(DataLoader(stream, BATCH)),
    }
    accelerated = accelerate_loaders(table, stream) if setting.accelerate else {}
    parts: dict[str, dict[str, Callable[[], Iterable[Any]]]] = {}
    for name, loader in by_hand.items():
        if size == 1 and name == "dispatch":
            continue
        ways = {"hand-written": loader, "hand-written, again": loader, "paceline": prepared[name]}
        if name in accelerated:
            ways["Accelerate"] = accelerated[name]
        parts[name] = {way: (lambda loader=loader: loader) for way, loader in ways.items()}  # type: ignore[misc]
    return parts


def accelerate_loaders(table: Table, stream: Stream) -> dict[str, Any]:
    """Prepare the same loaders with Accelerate."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    found = {}
    for name, dispatch in (("map-style", False), ("stream", False), ("dispatch", True)):
        config = DataLoaderConfiguration(dispatch_batches=dispatch)
        accelerator = Accelerator(cpu=True, dataloader_config=config)
        loader = DataLoader(table, BATCH, shuffle=True) if name == "map-style" else DataLoader(stream, BATCH)
        found[name] = accelerator.prepare(loader)
    return found


def run_rank(rank: int, setting: Setting, results: Path) -> None:
    """Measure on one rank; each rank writes its results."""
    torch.set_num_threads(1)
    for name in WORLD_VARIABLES:
        os.environ.pop(name, None)
    if setting.processes > 1:
        size = str(setting.processes)
        values = (str(rank), size, str(rank), size, "127.0.0.1", str(setting.port))
        os.environ.update(zip(WORLD_VARIABLES, values, strict=True))
        dist.init_process_group("gloo")
    found = {part: measure(ways, setting) for part, ways in contenders(setting, rank).items()}
    (results / f"{rank}.json").write_text(json.dumps(found))
    if setting.processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def measure(ways: dict[str, Callable[[], Iterable[Any]]], setting: Setting) -> dict[str, list[Pass]]:
    """Let the contenders take turns; return the wall and CPU seconds of each pass."""
    times: dict[str, list[Pass]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(setting.rounds + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            if setting.processes > 1:
                dist.barrier()
            wall, used = time.perf_counter(), time.process_time()
            for _ in ways[name]():
                pass
            times[name].append((time.perf_counter() - wall, time.process_time() - used))
    return {name: found[1:] for name, found in times.items()}


def report(processes: int, samples: int, folder: Path) -> None:
    """Print a table of the ranks' results."""
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
    for part in ranks[0]:
        # Wall time of the slowest rank; CPU time of all ranks.
        wall, used = {}, {}
        for way in ranks[0][part]:
            passes = list(zip(*(rank[part][way] for rank in ranks), strict=True))
            wall[way] = [max(seconds for seconds, _ in rounds) for rounds in passes]
            used[way] = [sum(seconds for _, seconds in rounds) for rounds in passes]
        for way in wall:
            row = [part, str(processes), way, f"{statistics.median(used[way]) / samples * 1e6:.2f}"]
            for times in (used, wall):
                ratios = [mine / base for mine, base in zip(times[way], times["hand-written"], strict=True)]
                row.append("1" if way == "hand-written" else f"{statistics.median(ratios):.2f}")
            print("| " + " | ".join(row) + " |")


def resume(samples: int, seconds: float) -> None:
    """Print how long the first batch takes when resuming at 90 % of a stream."""
    # The first use of numpy's random numbers in a process imports them, 8 ms; loading a checkpoint has done that.
    importlib.import_module("numpy.random")
    kinds = {"state_dict": StatefulStream, "skip(n)": SkippingStream, "neither": SlowStream}
    print(f"\nResuming a stream of {samples:,} samples at 90 %, where each sample takes {seconds * 1e6:g} us:")
    print("\n| the data set offers | ms of CPU time until the first batch |\n|---|--:|")
    for name, kind in kinds.items():
        turns = 1 if name == "neither" else 9
        took = [seconds_to_first(kind(samples, seconds), samples * 9 // 10 // BATCH) for _ in range(turns)]
        print(f"| {name} | {statistics.median(took) * 1000:.2f} |")


def seconds_to_first(stream: SlowStream, batches: int) -> float:
    """Return the processor seconds to the batch after `batches`."""
    from paceline import Accelerator

    loader = Accelerator(cpu=True).prepare(DataLoader(stream, BATCH))
    state = {**loader.state_dict(), "samples": batches * BATCH, "batches": batches}
    if isinstance(stream, StatefulStream):
        inner = {"dataset": {"position": batches * BATCH}, "number": 0, "finished": False}
        state["stream"] = {"kind": "dataset", "state": inner}
    loader.load_state_dict(state)
    began = time.process_time()
    first = next(iter(loader))
    took = time.process_time() - began
    assert first[0] == batches * BATCH
    return took


def main() -> None:
    """Measure, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=16_000, help="samples per pass (default: 16000)")
    parser.add_argument("--rounds", type=int, default=12, help="passes per contender (default: 12)")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2], help="numbers of ranks (default: 1 2)")
    args = parser.parse_args()
    with_accelerate = importlib.util.find_spec("accelerate") is not None
    print("| data | ranks | loader | CPU us per sample | CPU ratio | wall ratio |")
    print("|---|--:|---|--:|--:|--:|")
    for processes in args.processes:
        with socket.socket() as listener, tempfile.TemporaryDirectory() as folder:
            listener.bind(("", 0))
            port = listener.getsockname()[1]
            listener.close()
            setting = Setting(args.samples, args.rounds, processes, with_accelerate and processes > 1, port)
            spawn_ranks(run_rank, (setting, Path(folder)), processes)  # type: ignore[no-untyped-call]
            report(processes, args.samples, Path(folder))
    resume(100_000, 50e-6)


if __name__ == "__main__":
    main()
