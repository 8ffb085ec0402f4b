"""Ends of pairs of ranks, many and cheap: each is forked from a process that has imported everything, and ends as a
program does, by taking its interpreter apart.

Run as a program: `python -m tests.support.forked FOLDER COUNT SCRIPT ARGUMENTS`.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.ranks import free_port

ROOT = Path(__file__).parents[2]
# Pairs that run at once.
_TOGETHER = 2


def run_pairs(folder: Path, script: Path, cases: list[list[str]], *, timeout: float) -> list[list[tuple[int, str]]]:
    """Run a pair of ranks of a script for each list of arguments; each rank's exit code and output, by rank."""
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.forked", str(folder), str(script)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    codes = json.loads((folder / "codes.json").read_text(encoding="utf-8"))
    return [
        [(codes[f"{pair}.{rank}"], (folder / f"{pair}.{rank}.txt").read_text(encoding="utf-8")) for rank in range(2)]
        for pair in range(len(cases))
    ]


def _import_all() -> None:
    import torch
    import torch.distributed.fsdp

    from paceline.strategies import load_strategy

    torch.set_num_threads(1)
    for name in ("ddp", "fsdp"):
        load_strategy(name)


def _become_rank(folder: Path, pair: int, rank: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    output = os.open(folder / f"{pair}.{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)


def _fork_pairs(folder: Path, cases: list[list[str]]) -> list[str] | None:
    """In each forked rank, return the arguments of its script; in the process that forks, None once all have ended."""
    running: dict[int, str] = {}
    codes: dict[str, int] = {}
    for pair, case in enumerate(cases):
        port = free_port()
        for rank in range(2):
            child = os.fork()
            if child == 0:
                _become_rank(folder, pair, rank, port)
                return case
            running[child] = f"{pair}.{rank}"
        while len(running) >= 2 * _TOGETHER:
            _reap(running, codes)
    while running:
        _reap(running, codes)
    (folder / "codes.json").write_text(json.dumps(codes), encoding="utf-8")
    return None


def _reap(running: dict[int, str], codes: dict[str, int]) -> None:
    child, status = os.wait()
    codes[running.pop(child)] = os.waitstatus_to_exitcode(status)


def _main(arguments: list[str]) -> None:
    folder, script = Path(arguments[0]), arguments[1]
    _import_all()
    case: list[str] | None = _fork_pairs(folder, json.loads((folder / "cases.json").read_text(encoding="utf-8")))
    if case is not None:
        sys.argv = [script, *case]
        names: dict[str, Any] = {}
        runpy.run_path(script, names, run_name="__main__")


if __name__ == "__main__":
    _main(sys.argv[1:])
