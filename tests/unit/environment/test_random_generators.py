"""One seed for all generators, and one of its own for each rank."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from paceline import set_seed
from paceline.errors import UsageError


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(name, str(value))


def test_the_same_seed_draws_the_same() -> None:
    set_seed(7)
    first = drawn()
    set_seed(7)
    assert drawn() == first
    set_seed(8)
    assert not set(drawn()) & set(first)


def test_ranks_draw_alike_unless_asked_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    set_seed(7)
    first = drawn()
    as_rank(monkeypatch, 3)
    set_seed(7)
    assert drawn() == first


def test_device_specific_finds_the_rank_out_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    set_seed(10)
    tenth = drawn()
    as_rank(monkeypatch, 3)
    set_seed(7, device_specific=True)
    assert drawn() == tenth
    set_seed(9, device_specific=True, rank=1)
    assert drawn() == tenth


def test_a_seed_is_any_integer() -> None:
    set_seed(7)
    first = drawn()
    for seed in (np.int64(7), torch.tensor(7)):
        set_seed(seed)  # type: ignore[arg-type]
        assert drawn() == first


@pytest.mark.parametrize("seed", [None, 1.5, "7"])
def test_what_is_no_seed(seed: Any) -> None:
    with pytest.raises(UsageError, match=f"set_seed got {seed!r}, a {type(seed).__name__}"):
        set_seed(seed)


_THREADS = """
import gc, os, sys, threading, time
import torch
from paceline.environment.random_generators import state_of

class Node:
    pass

def read():
    while time.monotonic() < end:
        node = Node()
        node.itself, node.tensor = node, torch.ones(1)
        del node
        state_of(torch.default_generator)

sys.setswitchinterval(1e-6)
gc.set_threshold(1, 1, 1)
end = time.monotonic() + 2
threads = [threading.Thread(target=read) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("all ended", gc.isenabled())
"""


def test_threads_that_read_one_generator_do_not_wait_for_ever() -> None:
    """With `generator.get_state()` in its place they do, within a second."""
    done = subprocess.run([sys.executable, "-c", _THREADS], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "all ended True\n"
