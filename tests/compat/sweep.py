"""Compares many runs on a machine with many cores: each strategy under the switch with what Accelerate gives.

python -m tests.compat.sweep [--workers 8] [--only trl] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tests.compat.compare import TOLERANCE, numbers, verdict
from tests.compat.trl_runs import MORE, RUNS_SHARDED, TRAINERS

TIMEOUT = 400.0


class Task(NamedTuple):
    """Runs of one side, in processes of their own."""

    side: str
    group: str
    ranks: int
    runs: tuple[str, ...]

    def results(self) -> list[dict[str, Any]]:
        """What the runs return, by rank."""
        return numbers(self.side, self.group, list(self.runs), self.ranks, TIMEOUT)


class Comparison(NamedTuple):
    """A run under the switch, and the one of Accelerate that it must equal."""

    title: str
    real: tuple[Task, str]
    switched: tuple[Task, str]


def trl_comparisons() -> list[Comparison]:
    """TRL's trainers on two ranks, by strategy."""
    comparisons = []
    for strategy, runs in RUNS_SHARDED.items():
        for trainer in TRAINERS:
            some = tuple(run for run in runs if run.startswith(trainer))
            real, switched = (Task(side, "trl_runs", 2, some) for side in ("real", "switched"))
            comparisons += [Comparison(f"{run} x2", (real, run), (switched, run)) for run in some]
        more = tuple(f"{kind}, {strategy}" for kind in MORE)
        real, switched = (Task(side, "trl_runs", 2, more) for side in ("real", "switched"))
        comparisons += [Comparison(f"{run} x2", (real, run), (switched, run)) for run in more]
    return comparisons


def bf16_comparisons() -> list[Comparison]:
    """The Trainer in bf16 under ZeRO, on one rank: there Accelerate drives DeepSpeed on the CPU too."""
    comparisons = []
    for strategy in ("zero2", "zero3"):
        runs = tuple(f"{way}, {strategy}" for way in ("shuffle", "bf16", "bf16 accumulation"))
        real, switched = (Task(side, "trainer_runs", 1, runs) for side in ("real", "switched"))
        comparisons += [Comparison(f"{run} x1", (real, run), (switched, run)) for run in runs]
    return comparisons


SETS = {"trl": trl_comparisons, "bf16": bf16_comparisons}


def main() -> None:
    """Print a table: each run, and whether it is equal."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=8, help="tasks at a time, of one or two processes")
    parser.add_argument("--only", choices=tuple(SETS))
    parser.add_argument("--json", type=Path, help="where to write all numbers")
    options = parser.parse_args()
    comparisons = [one for name, made in SETS.items() if options.only in (None, name) for one in made()]
    tasks = list(dict.fromkeys(task for one in comparisons for task in (one.real[0], one.switched[0])))
    with ThreadPoolExecutor(options.workers) as pool:
        results = dict(zip(tasks, pool.map(Task.results, tasks), strict=True))
    if options.json:
        options.json.write_text(json.dumps([[*task, results[task]] for task in tasks]))
    for one in comparisons:
        size, where = verdict(_named(results, one.real), _named(results, one.switched), "run")
        shown = where.strip().splitlines()[-1][:200]
        print(f"{one.title:28} {'equal' if size <= TOLERANCE else f'differs by {size:.2g}':22} {shown}")


def _named(results: dict[Task, list[dict[str, Any]]], source: tuple[Task, str]) -> list[dict[str, Any]]:
    """One run of a task under the name "run", by rank."""
    task, run = source
    return [
        {"run": answers[run]} if run in answers else {"process": answers.get("process", {"error": "no answer"})}
        for answers in results[task]
    ]


if __name__ == "__main__":
    main()
