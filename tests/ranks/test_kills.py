"""A run that is killed at any moment goes on as if nothing had happened."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from paceline.checkpoint import find_checkpoints
from tests.ranks import checkpoint_script
from tests.support.launched import assert_same_weights, final_weights, lines_in, start
from tests.support.ranks import run_on_ranks

STEPS = 30


def steps_of(folder: Path, rank: int) -> dict[int, tuple[list[int], float]]:
    """What each step came to, the last time it was taken; every time it must have been the same."""
    found: dict[int, tuple[list[int], float]] = {}
    for line in lines_in(folder, rank):
        if "step" in line:
            value = line["ids"], line["loss"]
            assert found.setdefault(line["step"], value) == value, f"step {line['step']} was taken twice, differently"
    return found


@pytest.fixture(scope="module")
def strategy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def never_killed(strategy: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run_on_ranks(2, checkpoint_script.main, str(folder), strategy, str(STEPS), "1000", "blocking")
    return folder


def kill_until_done(folder: Path, strategy: str, kills: int, seed: int) -> None:
    """Kill a run again and again while it trains and saves, then let it come to its end."""
    chance = random.Random(seed)
    for _ in range(kills):
        how = chance.choice(["blocking", "background"])
        run = start(folder, strategy, str(STEPS), "1", how, "slow")
        before = len(run.lines())
        run.wait_for_lines(before + chance.randint(3, 6))
        # Somewhere within a step and its save.
        time.sleep(chance.random() * 0.08)
        run.kill_everything()
        assert any(found.checkpoint for found in find_checkpoints(folder)), "no complete checkpoint is left"
    run_on_ranks(2, checkpoint_script.main, str(folder), strategy, str(STEPS), "1", "blocking")


def check(never_killed: Path, strategy: str, folder: Path, kills: int, seed: int) -> None:
    kill_until_done(folder, strategy, kills, seed)
    for rank in range(2):
        assert steps_of(folder, rank) == steps_of(never_killed, rank)
    assert_same_weights(final_weights(folder), final_weights(never_killed))
    left = {path.name for path in (folder / "checkpoints").iterdir()}
    assert left == {f"checkpoint_{number}" for number in sorted(int(n.split("_")[1]) for n in left)}, "leftovers"


@pytest.mark.parametrize("strategy", ["fsdp"], indirect=True)
def test_killed_once(never_killed: Path, strategy: str, tmp_path: Path) -> None:
    check(never_killed, strategy, tmp_path, kills=1, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 27))
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"], indirect=True)
def test_killed_again_and_again(never_killed: Path, strategy: str, tmp_path: Path, seed: int) -> None:
    """25 runs of 4 kills under each of two strategies."""
    check(never_killed, strategy, tmp_path, kills=4, seed=seed)
