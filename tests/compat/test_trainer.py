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
    # There the real one trains without DDP after an evaluation and a prediction.
    _compare([way for way in WAYS if way != "predict first"], 2)


@pytest.mark.slow
@needs_peft
@pytest.mark.parametrize(
    "strategy", ["fsdp", pytest.param("zero2", marks=needs_deepspeed), pytest.param("zero3", marks=needs_deepspeed)]
)
def test_sharded(strategy: str) -> None:
    _compare(list(RUNS_SHARDED[strategy]), 2)


@pytest.mark.slow
def test_predicting_before_training_leaves_the_ranks_together() -> None:
    found = numbers("switched", "trainer_runs", ["predict first"], 2)
    straight = numbers("switched", "trainer_runs", ["shuffle"], 2)
    assert found[0]["predict first"]["weights"] == pytest.approx(straight[0]["shuffle"]["weights"], rel=TOLERANCE)
