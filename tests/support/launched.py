"""Launches of a script that saves as it goes, and what they leave."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

SCRIPT = Path(__file__).parents[1] / "ranks" / "checkpoint_script.py"


@dataclass
class Launched:
    """One launch of the script."""

    folder: Path
    process: subprocess.Popen[str]

    def lines(self, rank: int = 0) -> list[dict[str, Any]]:
        """What a rank has written about its steps so far."""
        return lines_in(self.folder, rank)

    def wait_for(self, condition: Callable[[], bool], seconds: float = 400.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline, "it did not come so far"
            time.sleep(0.01)

    def wait_for_lines(self, count: int, rank: int = 0) -> None:
        self.wait_for(lambda: len(self.lines(rank)) >= count)

    def kill_everything(self) -> None:
        """SIGKILL to the launcher and every rank at once, as a power cut would."""
        os.killpg(self.process.pid, signal.SIGKILL)
        for rank in range(8):
            for line in self.lines(rank):
                if "pid" in line:
                    with_no_such_process(line["pid"])
        self.process.communicate()

    def end(self, seconds: float = 400.0) -> tuple[int, str]:
        out, _ = self.process.communicate(timeout=seconds)
        return self.process.returncode, out


def lines_in(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    """What a rank has written about its steps into a folder."""
    path = folder / f"log-{rank}"
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in whole.splitlines()]


def with_no_such_process(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def start(folder: Path, *arguments: str, ranks: int = 2, flags: tuple[str, ...] = ()) -> Launched:
    """Launch the script on CPU ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "paceline", "launch", "--cpu", "--num_processes", str(ranks), *flags,
        str(SCRIPT), str(folder), *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, env=environment
    )
    return Launched(folder, process)


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = torch.load(folder / "final.pt", weights_only=True)
    return weights


def assert_same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
