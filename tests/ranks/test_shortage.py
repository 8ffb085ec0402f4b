"""A real process that runs out of memory says who holds it, and what would help."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("shortage_script.py")
SIZE = r"[\d.]+ [KMG]iB"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*command: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=800, env=ENVIRONMENT, check=False
    )
    return done.returncode, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits what a process may have")
def test_memory_that_runs_out_is_told_by_owner() -> None:
    code, error = run("-m", "paceline", "launch", "--cpu", "--num_processes", "1", str(SCRIPT), "tensor")
    assert code == 1, error
    assert error.count("you tried to allocate 67108864 bytes") == 1, error
    told = error[error.index("memory of rank 0 on cpu") :]
    assert "and 64.00 MiB more were requested" in told
    assert re.search(rf"parameters 8\.01 MiB, gradients 8\.01 MiB, optimizer state 16\.0\d MiB, .* else {SIZE}", told)
    assert re.search(r"^  4\.00 MiB  .*(optimizer state|gradient of|parameter)", told, re.MULTILINE)
    assert "batches of 4 with gradient_accumulation_steps=4, the same optimizer steps: frees about" in told
    assert told.rstrip().endswith("which is enough"), "the smallest change that is enough is the last word"


@pytest.mark.slow
def test_a_plain_memory_error_is_told_too_without_our_launcher() -> None:
    code, error = run(str(SCRIPT), "bytes")
    assert code == 1, error
    assert "MemoryError" in error
    assert "memory of rank 0 on cpu" in error
    assert "what would help, the smallest change first:" in error
