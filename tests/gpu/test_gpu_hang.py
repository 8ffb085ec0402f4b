"""Ranks that wait for each other over NCCL, where the host runs ahead of what the devices exchange."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest

from paceline.errors import HUNG
from tests.ranks.test_hangs import ENVIRONMENT, SCRIPT, line

pytestmark = pytest.mark.gpus2


def launched(scenario: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "paceline", "launch", "--num_processes", "2", "--hang_timeout", "5"]
    command += [str(SCRIPT), scenario]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, env=ENVIRONMENT, check=False)
    return done.returncode, done.stderr


def test_a_rank_that_sleeps() -> None:
    code, error = launched("sleep")
    assert code == HUNG, error
    assert re.search(r"rank 1 has not entered .*all_?reduce #\d+ of float32", error), error
    assert f"rank 1: {line('it sleeps here')}" in error
    for folder in re.findall(r"stacks .* are in (\S+)", error):
        shutil.rmtree(folder)


def test_a_rank_that_skips_an_exchange() -> None:
    code, error = launched("skip")
    assert code == HUNG, error
    # One waits for its device, the other in host memory, over two backends.
    assert f"rank 0: {line('only some come here')}" in error
    assert f"rank 1: {line('the one that skipped it')}" in error
    for folder in re.findall(r"stacks .* are in (\S+)", error):
        shutil.rmtree(folder)


def test_long_work_outside_of_exchanges_is_no_hang() -> None:
    code, error = launched("long")
    assert code == 0, error
    assert "waited" not in error
