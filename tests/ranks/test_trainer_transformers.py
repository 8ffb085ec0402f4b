"""The same script with transformers' Trainer on Accelerate, and with ours: the same numbers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import side_by_side
from tests.support.ranks import run_on_ranks

# Looked for without importing them, which would set variables in this process.
MISSING = [name for name in ("transformers", "accelerate") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"pip install {' '.join(MISSING)}")

ROOT = Path(__file__).parents[2]


def both(what: str, folder: Path, ranks: int) -> tuple[Any, Any]:
    """What transformers' Trainer finds in processes of its own, and what ours finds."""
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"] if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, *launch, "-m", "tests.support.side_by_side", what, str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    return theirs, run_on_ranks(ranks, side_by_side.WHAT[what], "paceline", str(folder))[0]


@pytest.fixture(
    scope="module", params=[pytest.param(1, marks=pytest.mark.slow, id="single"), pytest.param(2, id="ddp")]
)
def logs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return both("cases", tmp_path_factory.mktemp("side_by_side"), request.param)


@pytest.mark.parametrize("case", side_by_side.CASES)
def test_every_step_is_the_same(case: str, logs: tuple[Any, Any]) -> None:
    theirs, mine = ([entry for entry in side[case] if "loss" in entry] for side in logs)
    assert len(mine) == len(theirs) == side_by_side.STEPS
    for name in ("loss", "grad_norm", "learning_rate", "epoch"):
        gaps = [abs(one[name] - other[name]) for one, other in zip(mine, theirs, strict=True)]
        # A norm adds up all parameters, and how its last digits come out depends on the processor.
        assert max(gaps) < (5e-5 if name == "grad_norm" else 1e-5), name


@pytest.mark.parametrize("case", side_by_side.CASES)
def test_every_evaluation_is_the_same(case: str, logs: tuple[Any, Any]) -> None:
    theirs, mine = ([entry for entry in side[case] if "eval_loss" in entry] for side in logs)
    assert [entry["step"] for entry in mine] == [entry["step"] for entry in theirs] == [20, 40, 50]
    for name in ("eval_loss", "eval_right", "eval_samples"):
        assert [entry[name] for entry in mine] == pytest.approx([entry[name] for entry in theirs], abs=1e-5), name


@pytest.mark.slow
def test_every_event_comes_when_it_should_with_the_same_flags(tmp_path: Path) -> None:
    theirs, mine = both("flows", tmp_path, 1)
    for flow in side_by_side.FLOWS:
        assert mine[flow] == theirs[flow], flow
        assert len(mine[flow]) > 50


def test_the_whole_loss_is_the_same(logs: tuple[Any, Any]) -> None:
    for case in side_by_side.CASES:
        theirs, mine = (next(entry for entry in side[case] if "train_loss" in entry) for side in logs)
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], abs=1e-5)
