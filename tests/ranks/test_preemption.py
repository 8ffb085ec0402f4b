"""A signal to one rank or to the launcher: all ranks agree where to stop, save, and end with a code of their own."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from paceline.checkpoint import newest_checkpoint
from paceline.errors import PREEMPTED
from tests.ranks import checkpoint_script
from tests.support.launched import Launched, assert_same_weights, final_weights, start
from tests.support.ranks import run_on_ranks

if TYPE_CHECKING:
    from pathlib import Path

STEPS = "40"


def pid_of(run: Launched, rank: int) -> int:
    return int(run.lines(rank)[0]["pid"])


def go_on_and_compare(folder: Path, whole: Path) -> None:
    run_on_ranks(2, checkpoint_script.main, str(folder), "ddp", STEPS, "1000", "blocking")
    assert_same_weights(final_weights(folder), final_weights(whole))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run_on_ranks(2, checkpoint_script.main, str(folder), "ddp", STEPS, "1000", "blocking")
    return folder


@pytest.mark.parametrize(
    ("number", "to"),
    [
        pytest.param(signal.SIGTERM, "rank", marks=pytest.mark.slow),
        (signal.SIGUSR1, "launcher"),
    ],
)
def test_a_signal_saves_and_ends_the_run(whole: Path, tmp_path: Path, number: int, to: str) -> None:
    run = start(tmp_path, "ddp", STEPS, "1000", "blocking", "linger")
    run.wait_for(lambda: len(run.lines(1)) > 4)
    os.kill(pid_of(run, 1) if to == "rank" else run.process.pid, number)
    code, out = run.end()
    assert code == PREEMPTED, out
    assert "preempted: the state is saved" in out
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.manifest.step == run.lines(0)[-1]["step"] == run.lines(1)[-1]["step"]
    go_on_and_compare(tmp_path, whole)


@pytest.mark.slow
def test_a_signal_is_heard_during_evaluation(tmp_path: Path) -> None:
    run = start(tmp_path, "ddp", STEPS, "1000", "blocking", "evaluate")
    # 6 steps of 2 x 4 samples make an epoch; then it evaluates until it is asked to make room.
    run.wait_for(lambda: len(run.lines(0)) == 7)
    os.kill(pid_of(run, 0), signal.SIGTERM)
    code, out = run.end()
    assert code == PREEMPTED, out
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.manifest.step == 6


@pytest.mark.slow
def test_a_crash_is_followed_by_a_restart_that_goes_on(whole: Path, tmp_path: Path) -> None:
    run = start(tmp_path, "ddp", STEPS, "2", "blocking", "linger", flags=("--max_restarts", "2"))
    run.wait_for(lambda: len(run.lines(1)) > 8)
    os.kill(pid_of(run, 1), signal.SIGKILL)
    code, out = run.end()
    assert code == 0, out
    starts = [line["start"] for line in run.lines(0) if "start" in line]
    assert starts[0] == 0
    assert starts[1] >= 6
    assert_same_weights(final_weights(tmp_path), final_weights(whole))
