"""transformers' Trainer gives the same numbers on Accelerate and through the switch."""

from __future__ import annotations

import importlib.util

import pytest

from tests.compat.compare import TOLERANCE, numbers, verdict
from tests.compat.trainer_runs import RUNS_SHARDED, SHORT, WAYS

pytestmark = [pytest.mark.compat, pytest.mark.timeout(3600)]
pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


# There the real one trains without DDP, and the ranks end apart.
WRONG_ON_RANKS = ("evaluate first", "predict first")


def _compare(runs: list[str], ranks: int) -> None:
    expected = numbers("real", "trainer_runs", runs, ranks, timeout=1800)
    found = numbers("switched", "trainer_runs", runs, ranks, timeout=1800)
    verdicts = {run: verdict(expected, found, run) for run in runs}
    assert {run: where for run, (size, where) in verdicts.items() if size > TOLERANCE} == {}


def test_the_short_version() -> None:
    _compare(list(SHORT), 1)


@pytest.mark.slow
@needs_peft
def test_every_way_on_one_process() -> None:
    _compare(list(WAYS), 1)


@pytest.mark.slow
@needs_peft
def test_every_way_under_ddp() -> None:
    # Ranks with different numbers of batches wait for each other without end, on both sides.
    _compare([way for way in WAYS if way not in (*WRONG_ON_RANKS, "uneven batches")], 2)


@pytest.mark.slow
@needs_peft
@pytest.mark.parametrize(
    "strategy", ["fsdp", pytest.param("zero2", marks=needs_deepspeed), pytest.param("zero3", marks=needs_deepspeed)]
)
def test_sharded(strategy: str) -> None:
    wrong = [f"{way}, {strategy}" for way in WRONG_ON_RANKS]
    _compare([run for run in RUNS_SHARDED[strategy] if run not in wrong], 2)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["", ", fsdp"])
def test_evaluating_before_training_changes_nothing(strategy: str) -> None:
    runs = [f"{way}{strategy}" for way in ("shuffle", *WRONG_ON_RANKS)]
    for found in numbers("switched", "trainer_runs", runs, 2):
        weights = [found[run]["weights"] for run in runs]
        assert weights == pytest.approx([weights[0]] * len(runs), rel=TOLERANCE)
