"""Chooses the cases of parametrized tests that run under `make test-slow` only, from the times of a whole run.

    python -m pytest -n 2 --dist loadfile --junitxml times.xml -m "not gpu and not gpus2"
    python -m tests.support.slow_cases times.xml

Of each test the cheapest case stays, and the cheapest that shards with FSDP2; cases that take less than half a second
stay as well. The rest is written to `tests/slow_cases.txt`, which `tests/conftest.py` reads.
"""

from __future__ import annotations

import statistics
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from functools import cache
from pathlib import Path

FILE = Path(__file__).parents[1] / "slow_cases.txt"
# Seconds that a case may take without being slow.
CHEAP = 0.5
# The first case of a file also starts its ranks: it counts as at most so many times the median of its test.
MAX_OVER_MEDIAN = 3


def main(report: str) -> None:
    """Write the file from a report of pytest."""
    tests: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name', '')}"
        if "[" in name and case.find("skipped") is None:
            tests[name.partition("[")[0]].append((float(case.get("time", 0)), name))
    slow = sorted(name for cases in tests.values() for name in _slow(cases))
    FILE.write_text("\n".join(slow) + "\n")
    print(f"{len(slow)} cases of {len(tests)} tests are slow")


def _slow(cases: list[tuple[float, str]]) -> list[str]:
    most = MAX_OVER_MEDIAN * statistics.median(seconds for seconds, _ in cases)
    ordered = sorted((min(seconds, most), name) for seconds, name in cases)
    sharded = [name for _, name in ordered if "fsdp" in name]
    kept = {ordered[0][1], *sharded[:1]}
    return [name for seconds, name in ordered if seconds >= CHEAP and name not in kept]


@cache
def slow_cases() -> frozenset[str]:
    """Return the names of the cases, as pytest writes them."""
    return frozenset(FILE.read_text().splitlines())


if __name__ == "__main__":
    main(sys.argv[1])
