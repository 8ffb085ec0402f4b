"""The same script with transformers' Trainer on Accelerate, and with ours: the same numbers."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paceline.errors import CheckpointError
from paceline.trainer import get_last_checkpoint
from tests.support import side_by_side
from tests.support.ranks import run_on_ranks
from tests.support.trainer import run

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


WRITER = """
import sys
from transformers import Trainer, TrainingArguments
from tests.support.trainer import Sentences, arguments, tagger

changes = {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": int(sys.argv[2])}
args = TrainingArguments(**arguments(sys.argv[1], **changes))
Trainer(tagger(), args, train_dataset=Sentences(16, 1)).train()
"""
RESUMED = {"max_steps": -1, "num_train_epochs": 3, "save_strategy": "epoch"}


def write(folder: Path, save_steps: int) -> None:
    """Two epochs of four steps with transformers' Trainer, in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, "-c", WRITER, str(folder), str(save_steps)]
    subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, timeout=300, check=True)


def resumed(folder: str, resume: Any) -> tuple[list[int], int, float]:
    log, trainer = run(RESUMED, folder, samples=16, resume=resume)
    return [entry["step"] for entry in log if "loss" in entry], trainer.state.global_step, trainer.state.epoch


@pytest.mark.parametrize("ranks", [1, 2])
def test_true_finds_the_newest_checkpoint_of_transformers(ranks: int, tmp_path: Path) -> None:
    write(tmp_path, 4)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-8"}
    last = get_last_checkpoint(tmp_path)
    assert last == str(tmp_path / "checkpoint-8")
    [(steps, total, epoch), *_] = run_on_ranks(ranks, resumed, str(tmp_path), True)
    # The third epoch, and nothing of the first two.
    assert steps[-4 // ranks :] == list(range(9, 9 + 4 // ranks))
    assert (total, epoch) == (8 + 4 // ranks, 3.0)
    # Its checkpoint is newer than those of transformers.
    assert get_last_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{total}")


def test_true_names_a_checkpoint_of_transformers_within_an_epoch(tmp_path: Path) -> None:
    write(tmp_path, 3)
    shutil.rmtree(tmp_path / "checkpoint-8")  # its last one
    with pytest.raises(CheckpointError, match=r"checkpoint-6 was saved by another library within .* at epoch 1\.5"):
        run(RESUMED, str(tmp_path), samples=16, resume=True)
