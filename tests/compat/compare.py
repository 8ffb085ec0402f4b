"""Runs a group of scripts on Accelerate and through the switch, and says by how much their numbers differ.

python -m tests.compat.compare GROUP [--ranks 2] [RUN...]
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.support.ranks import free_port

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5
# Seconds between the failure of a rank and the end of the others.
_GRACE = 15.0


def numbers(side: str, group: str, runs: list[str], ranks: int = 1, timeout: float = 900.0) -> list[dict[str, Any]]:
    """What the runs return, by rank, from processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        ports = [str(free_port()) for _ in runs]
        processes = [_start(side, group, runs, folder, rank, ranks, ports) for rank in range(ranks)]
        _wait(processes, timeout)
        return [_read(folder, rank, process.returncode) for rank, process in enumerate(processes)]


def _start(
    side: str, group: str, runs: list[str], folder: str, rank: int, ranks: int, ports: list[str]
) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT / "src"), str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        ),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "COMPAT_SIDE": side,
        "PORTS": " ".join(ports),
    }
    if ranks > 1:
        environment.update(
            RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks),
            MASTER_ADDR="127.0.0.1",
        )  # fmt: skip
    command = [sys.executable, "-m", "tests.compat.child", side, group, folder, *runs]
    with Path(folder, f"rank{rank}.txt").open("wb") as errors:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=errors)


def _wait(processes: list[subprocess.Popen[bytes]], timeout: float) -> None:
    """Wait for all ranks. When one has failed, the others may wait for it without end: they get a moment."""
    ends = time.monotonic() + timeout
    while any(process.poll() is None for process in processes) and time.monotonic() < ends:
        if any(process.poll() for process in processes):
            ends = min(ends, time.monotonic() + _GRACE)
        time.sleep(0.2)
    for process in processes:
        process.kill()
        process.wait()


def _read(folder: str, rank: int, status: int) -> dict[str, Any]:
    path = Path(folder, f"rank{rank}.json")
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if status != 0:
        tail = Path(folder, f"rank{rank}.txt").read_text()[-2000:]
        found["process"] = {"error": f"exit status {status}: {tail}"}
    return found


def differences(expected: Any, found: Any, path: str = "") -> list[tuple[float, str]]:
    """Where two results differ, and by how much (relative where values exceed 1); infinite for what is no number."""
    if isinstance(expected, dict) and isinstance(found, dict):
        missing = [(math.inf, f"{path}/{key} is on one side only") for key in expected.keys() ^ found.keys()]
        common = [key for key in expected if key in found]
        return missing + [d for key in common for d in differences(expected[key], found[key], f"{path}/{key}")]
    if isinstance(expected, list) and isinstance(found, list):
        if len(expected) != len(found):
            return [(math.inf, f"{path} has {len(expected)} and {len(found)} entries")]
        pairs = enumerate(zip(expected, found, strict=True))
        return [d for i, (one, other) in pairs for d in differences(one, other, f"{path}/{i}")]
    if _is_number(expected) and _is_number(found):
        if expected == found or (math.isnan(expected) and math.isnan(found)):
            return []
        return [(abs(expected - found) / max(1.0, abs(expected)), f"{path}: {expected!r} and {found!r}")]
    return [] if expected == found else [(math.inf, f"{path}: {expected!r} and {found!r}")]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def verdict(expected: list[dict[str, Any]], found: list[dict[str, Any]], run: str) -> tuple[float, str]:
    """The largest difference of a run over all ranks, and where it is."""
    for name, side in (("Accelerate", expected), ("the switch", found)):
        for rank, answers in enumerate(side):
            answer = answers.get(run) or answers.get("process") or {"error": "no answer"}
            if "error" in answer:
                return math.inf, f"{name}, rank {rank}: {answer['error']}"
    all_of_them = [
        difference
        for rank, (ours, theirs) in enumerate(zip(expected, found, strict=True))
        for difference in differences(ours[run], theirs[run], f"rank {rank}")
    ]
    return max(all_of_them, default=(0.0, "equal"), key=lambda difference: difference[0])


def main() -> None:
    """Print a table: each run, and whether it is equal."""
    parser = argparse.ArgumentParser()
    parser.add_argument("group")
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=1500.0)
    parser.add_argument("--full", action="store_true", help="whole error messages")
    parser.add_argument("--only", help="one side: print its numbers")
    options = parser.parse_intermixed_args()
    runs = options.runs or list(importlib.import_module(f"tests.compat.{options.group}").RUNS)
    if options.only:
        print(json.dumps(numbers(options.only, options.group, runs, options.ranks, options.timeout), indent=1))
        return
    expected = numbers("real", options.group, runs, options.ranks, options.timeout)
    found = numbers("switched", options.group, runs, options.ranks, options.timeout)
    for run in runs:
        size, where = verdict(expected, found, run)
        shown = where if options.full else where.strip().splitlines()[-1][:200]
        print(f"{run:32} {'equal' if size <= TOLERANCE else f'differs by {size:.2g}':22} {shown}")


if __name__ == "__main__":
    main()
