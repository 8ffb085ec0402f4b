"""What it costs that DDP's gradients and weights are checked, beside DDP by hand, as ratios within one run.

    python -m benchmarks.gradient_guard     # from the repository's root

Two gloo processes. The models and loops are those of `step_overhead.py`; all contenders live in the same processes and
take turns in blocks of 64 steps, in an order that rotates. After each backward paceline notes whether DDP has averaged
every gradient, and after steps 1, 2, 4 ... 256, 512, 768 ... it compares a few elements of each weight over the ranks.
Beside the usual rhythm stand a run without either check and one that compares after every step.

A comparison is rare, so sums are compared here, not medians: the processor time of both ranks (all threads) over all
rounds, divided by that of DDP by hand; the wall time likewise. DDP by hand runs twice: how far the second one is from
1.00 says what the numbers are worth.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from benchmarks import step_overhead
from benchmarks.step_overhead import CASES, Contender, Paceline, Raw, RawAgain, Setting
from torch.multiprocessing.spawn import spawn as spawn_ranks

from paceline.strategies import check_schedule
from paceline.strategies.ddp.module import NamingDDP

RANKS = 2
BLOCK = 64


class Checked(Paceline):
    """As every run is."""

    title = f"paceline, weights compared every {check_schedule.EVERY} steps"


class ComparedAlways(Paceline):
    """What a comparison costs shows only if there are many."""

    title = "paceline, weights compared after every step"

    def step(self) -> None:
        """See `Contender.step`."""
        usual, check_schedule.EVERY = check_schedule.EVERY, 1
        super().step()
        check_schedule.EVERY = usual


class Unchecked(Paceline):
    """Without the checks."""

    title = "paceline, neither gradients nor weights checked"

    def build(self) -> None:
        """Replace what checks by nothing."""
        super().build()
        strategy: Any = self.accelerator.strategy
        strategy.stepped = lambda: None
        strategy.complete_gradients = lambda parameters: None
        self.model.__class__ = UncheckedDDP


class UncheckedDDP(NamingDDP):
    """Notes nothing about a backward."""

    def begin_backward(self) -> Any:
        """Do nothing."""

    def end_backward(self, before: Any) -> None:
        """Do nothing."""


CONTENDERS: dict[str, type[Contender]] = {
    "raw": Raw,
    "again": RawAgain,
    "checked": Checked,
    "unchecked": Unchecked,
    "always": ComparedAlways,
}


def run_rank(rank: int, setting: Setting, folder: Path) -> None:
    """Let all take turns on one rank; write the seconds that each took in all: of processors, and on the clock."""
    step_overhead.enter_world(rank, setting)
    dist.init_process_group("gloo")
    contenders = {name: kind(setting, torch.device("cpu")) for name, kind in CONTENDERS.items()}
    step_overhead.warm_up(contenders)
    names = list(contenders)
    seconds = {name: [0.0, 0.0] for name in names}
    for turn in range(setting.rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            dist.barrier()
            used, began = time.process_time(), time.perf_counter()
            for _ in range(setting.block):
                contenders[name].step()
            seconds[name][0] += time.process_time() - used
            seconds[name][1] += time.perf_counter() - began
    (folder / f"{rank}.json").write_text(json.dumps(seconds))
    dist.barrier()
    dist.destroy_process_group()


def report(setting: Setting, folder: Path) -> None:
    """Print a line for each contender."""
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]
    steps = setting.rounds * setting.block
    used = {name: sum(rank[name][0] for rank in ranks) for name in CONTENDERS}
    wall = {name: max(rank[name][1] for rank in ranks) for name in CONTENDERS}
    for name, kind in CONTENDERS.items():
        cells = [setting.case, kind.title, f"{used[name] / steps * 1e3:.3f}"]
        cells += [f"{used[name] / used['raw']:.3f}", f"{wall[name] / wall['raw']:.3f}"]
        print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="models (default: both)")
    parser.add_argument("--rounds", type=int, default=40, help="turns of each contender (default 40)")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    print("| model | loop | ms of processor time a step, both ranks | processor, ratio | wall, ratio |")
    print("|---|---|--:|--:|--:|", flush=True)
    for case in args.cases:
        with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            free.close()
            setting = Setting(
                case=case,
                device_type="cpu",
                processes=RANKS,
                accumulation=1,
                strategy="ddp",
                rounds=args.rounds,
                block=BLOCK if case == "mlp" else BLOCK // 8,
                threads=1,
                contenders=tuple(CONTENDERS),
                port=port,
            )
            spawn_ranks(run_rank, (setting, Path(folder)), RANKS)  # type: ignore[no-untyped-call]
            report(setting, Path(folder))


if __name__ == "__main__":
    main()
