"""TRL's trainers give the same numbers on Accelerate and through the switch."""

from __future__ import annotations

import pytest

from tests.compat.compare import TOLERANCE, numbers, verdict
from tests.compat.trl_runs import RUNS, RUNS_SHARDED

pytestmark = [pytest.mark.compat, pytest.mark.timeout(3600)]
for package in ("accelerate", "transformers", "trl", "peft", "datasets"):
    pytest.importorskip(package, reason=f"{package} is not installed")


def _compare(runs: list[str], ranks: int) -> None:
    expected = numbers("real", "trl_runs", runs, ranks, timeout=1800)
    found = numbers("switched", "trl_runs", runs, ranks, timeout=1800)
    verdicts = {run: verdict(expected, found, run) for run in runs}
    assert {run: where for run, (size, where) in verdicts.items() if size > TOLERANCE} == {}


@pytest.mark.parametrize("ranks", [1, 2])
def test_plain_and_under_ddp(ranks: int) -> None:
    _compare(list(RUNS), ranks)


@pytest.mark.parametrize("strategy", ["fsdp", "zero2", "zero3"])
def test_sharded(strategy: str) -> None:
    _compare(list(RUNS_SHARDED[strategy]), 2)
