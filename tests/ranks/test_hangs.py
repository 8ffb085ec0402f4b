"""Ranks that wait for others which do not come: who is missing, in what the others are, and at which line each is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from paceline import Accelerator
from paceline.errors import HUNG, CollectiveError
from tests.support.ranks import run_on_ranks

SCRIPT = Path(__file__).with_name("hang_script.py")
LINES = SCRIPT.read_text(encoding="utf-8").splitlines()
PATHS = [str(Path(__file__).parents[2]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, PATHS))}
# Seconds for one launch on a machine that is busy otherwise; the ranks that do not come sleep longer.
PATIENCE = 800


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where ranks run; stacks are written beneath it."""
    (tmp_path / "tmp").mkdir()
    return tmp_path


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    env = {**ENVIRONMENT, "TMPDIR": str(folder / "tmp")}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE, env=env, check=False)


def line(marked: str) -> str:
    """`file:line` of the one line of the script that has this mark."""
    (number,) = [n for n, text in enumerate(LINES, 1) if marked in text and "case" not in text]
    return f"{SCRIPT}:{number}"


def forked(folder: Path, *scenarios: str) -> dict[str, Any]:
    done = run(folder, sys.executable, str(SCRIPT), *scenarios)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def launched(folder: Path, scenario: str, *flags: str, ranks: int = 2) -> tuple[int, str]:
    command = [sys.executable, "-m", "paceline", "launch", "--cpu", "--num_processes", str(ranks)]
    done = run(folder, *command, "--hang_timeout", "5", *flags, str(SCRIPT), scenario)
    return done.returncode, done.stderr


@pytest.mark.slow
def test_who_is_missing_and_where_without_our_launcher(folder: Path) -> None:
    found = forked(folder, "sleep", "skip", "early")
    sleep = "".join(found["sleep"]["errors"])
    assert found["sleep"]["codes"] == [HUNG] * 3, sleep
    assert sleep.count("rank 1 has not entered backward (all_reduce #") == 1, "one rank tells it"
    assert re.search(r"of float32 \(10,\)\), in which ranks 0, 2 have waited for \d+ s", sleep)
    assert f"  ranks 0, 2: {line('waits in here')} in step: accelerator.backward" in sleep
    assert f"  rank 1: {line('it sleeps here')} in run: time.sleep(1000)" in sleep
    told = Path(re.findall(r"stacks .* are in (\S+)", sleep)[0])
    assert told.parent == folder / "tmp"
    stacks = {path.name: path.read_bytes() for path in told.iterdir()}
    assert {f"rank_{rank}.txt" for rank in range(3)} <= set(stacks)
    assert b"time.sleep(1000)" in stacks["rank_1.txt"]

    skip = "".join(found["skip"]["errors"])
    assert found["skip"]["codes"] == [HUNG] * 2, skip
    assert re.search(r"different calls: rank 0 in gather \(all_gather #\d+.*, rank 1 in wait_for_everyone \(", skip)
    assert f"rank 0: {line('only some come here')}" in skip
    assert f"rank 1: {line('the one that skipped it')}" in skip

    early = "".join(found["early"]["errors"])
    assert found["early"]["codes"] == [1, 0], early
    assert "rank 1 has ended without entering gather (all_gather #" in early
    assert f"rank 0: failed (CollectiveError), {line('once more than the other')}" in early


def test_a_method_that_only_rank_0_calls_is_named(folder: Path) -> None:
    code, error = launched(folder, "save")
    assert code == HUNG, error
    assert "save_state is not called by every rank: rank 0 is in it, and rank 1 is in backward (" in error
    assert f"rank 0: {line('under a branch')}" in error
    assert f"rank 1: {line('waits in here')}" in error
    assert "Every rank must call save_state: look for a branch that only some ranks take" in error
    assert error.count("is not called by every rank") == 1, "the launcher says it, once"
    assert "Traceback" not in error


def test_the_opening_of_a_group_that_only_one_rank_enters_is_noticed(folder: Path) -> None:
    """The first save opens one; torch waits in it without recording that."""
    scenarios = ["first save", "first save elsewhere", "open", "open and end"]
    found = forked(folder, *scenarios)
    save, elsewhere, opened, ended = ("".join(found[scenario]["errors"]) for scenario in scenarios)
    assert found["first save"]["codes"] == [HUNG, 0], save
    assert re.search(
        r"rank 1 has ended without entering save_state \(new_group #\d+\), in which rank 0 has waited for [345] s", save
    ), save
    assert f"  rank 0: {line('the only one that saves')}" in save

    assert found["first save elsewhere"]["codes"] == [HUNG] * 2, elsewhere
    assert re.search(
        r"rank 1 has not entered save_state \(new_group #\d+\), in which rank 0 has waited for \d+ s", elsewhere
    ), elsewhere
    assert f"  rank 0: {line('while the other is elsewhere')}" in elsewhere
    assert f"  rank 1: {line('it is here')}" in elsewhere
    assert "Every rank must call save_state" in elsewhere

    assert found["open"]["codes"] == [HUNG] * 2, opened
    assert re.search(r"rank 1 has not entered new_group #\d+, in which rank 0 has waited for \d+ s", opened), opened
    assert f"  rank 0: {line('a group of its own')}" in opened
    assert f"  rank 1: {line('and opens none')}" in opened

    assert found["open and end"]["codes"] == [HUNG, 0], ended
    assert re.search(r"rank 1 has ended without entering new_group #\d+, in which rank 0 has waited", ended), ended


def test_a_background_save_whose_other_rank_is_killed(folder: Path) -> None:
    found = forked(folder, "killed in a save")
    text = found["killed in a save"]["errors"][0]
    assert found["killed in a save"]["codes"] == [1, -9], text
    saves = (folder / "saves").resolve()
    (error,) = [line for line in text.splitlines() if line.startswith("CollectiveError: ")]
    assert f"The checkpoint {saves}/second was not finished: Rank 0 of 2 failed in " in error
    assert "Another rank exited, did not arrive in time" in error
    assert f"The newest complete checkpoint is {saves}/first." in error
    assert not re.search(r"pair\.cc|GLHF|/pytorch/", error), error


@pytest.mark.slow
def test_shapes_that_differ_name_rank_and_line(folder: Path) -> None:
    code, error = launched(folder, "shapes")
    # The rank that gets more than it expects is aborted by gloo; the other one may be the first to notice that.
    assert code == 134, error
    assert f"rank 0 on {os.uname().nodename}" in error
    assert f"was killed by SIGABRT at {line('of different shapes')}" in error
    assert "gloo aborts when ranks are in different collectives, or pass different sizes" in error


PLAIN = """
import os, time
import torch, torch.distributed as dist
dist.init_process_group("gloo")
if os.environ["RANK"] == "1":
    time.sleep(1000)
dist.all_reduce(torch.ones(3))
"""


@pytest.mark.slow
def test_a_script_without_an_accelerator_is_watched_too(folder: Path) -> None:
    (folder / "train.py").write_text(PLAIN)
    command = [sys.executable, "-m", "paceline", "launch", "--cpu", "--num_processes", "2", "--hang_timeout", "5"]
    done = run(folder, *command, "--log_dir", "logs", "train.py")
    assert done.returncode == HUNG, done.stderr
    assert "rank 1 has not entered all_reduce" in done.stderr
    assert f"rank 0: {folder}/train.py:7: dist.all_reduce(torch.ones(3))" in done.stderr
    assert f"rank 1: {folder}/train.py:6: time.sleep(1000)" in done.stderr
    told = Path(re.findall(r"stacks .* are in (\S+)", done.stderr)[0])
    assert told.parent == folder / "logs", "with the logs"
    assert b"time.sleep(1000)" in (told / "rank_1.txt").read_bytes()
    assert list((folder / "tmp").glob("paceline*")) == []


@pytest.mark.slow
def test_more_ways_to_wait(folder: Path) -> None:
    found = forked(folder, "stopped", "turns", "long")
    text = "".join(found["stopped"]["errors"])
    assert found["stopped"]["codes"] == [HUNG, -9], text
    assert re.search(
        r"^rank 1 does not respond; rank 0 has waited for \d+ s in gather \(all_reduce", text, re.MULTILINE
    )
    assert found["turns"] == {"codes": [0, 0], "errors": ["", ""]}
    assert found["long"] == {"codes": [0, 0], "errors": ["", ""]}, "long work outside of exchanges is no hang"

    code, error = launched(folder, "shapes", "--debug")
    assert code == 1, error
    assert "passes" in error
    assert "of shape (400,)" in error


# main_process_first


def taking_turns(folder: str) -> dict[str, Any]:
    accelerator = Accelerator(cpu=True)
    mark = Path(folder) / "made"
    found: dict[str, Any] = {}
    for turn in range(2):
        with accelerator.local_main_process_first():
            if accelerator.is_local_main_process:
                time.sleep(0.2)
                mark.with_suffix(f".{turn}").touch()
            found[f"there {turn}"] = mark.with_suffix(f".{turn}").exists()
    try:
        with accelerator.main_process_first():
            found["entered"] = True
            if accelerator.is_main_process:
                raise ValueError("the data is not there")
    except (ValueError, CollectiveError) as error:
        found["error"] = f"{type(error).__name__}: {error}"
    accelerator.wait_for_everyone()
    with accelerator.main_process_first():
        found["again"] = True
    return found


def test_what_the_first_raises_reaches_the_others(tmp_path: Path) -> None:
    first, second = run_on_ranks(2, taking_turns, str(tmp_path))
    for found in (first, second):
        assert (found["there 0"], found["there 1"], found["again"]) == (True, True, True)
    assert first["error"] == "ValueError: the data is not there"
    assert second["error"].startswith(
        "CollectiveError: Rank 0 went first and failed: ValueError: the data is not there."
    )
    assert "in taking_turns" in second["error"], "with the traceback of rank 0"
    assert (first["entered"], second.get("entered")) == (True, None)
