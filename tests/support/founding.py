"""Starts the program of tests/compat/founding.py with a configuration file, in the ways in which people start it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["launch_founding"]

ROOT = Path(__file__).parents[2]
PROGRAM = str(ROOT / "tests" / "compat" / "founding.py")
_WAYS = {
    "accelerate": ["accelerate.commands.launch"],
    "torchrun": ["torch.distributed.run", "--standalone"],
    "switched": ["paceline", "launch", "--quiet", "--as_accelerate"],
    "unswitched": ["paceline", "launch", "--quiet"],
}


def launch_founding(
    way: str,
    folder: Path,
    *flags: str,
    size: str = "tiny",
    steps: int = 6,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Run the program to its end.

    Args:
        way: Who launches: "accelerate", "torchrun", or paceline, "switched" or "unswitched".
        folder: Where it runs.
        *flags: Flags of the launcher.
        size: The model.
        steps: Optimizer steps.
        variables: More of the environment.

    Returns:
        What rank 0 printed, and under "output" everything that was printed.
    """
    search = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *_WAYS[way], *flags, PROGRAM, size, str(steps)],
        cwd=folder,
        env={**environment, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=800,
        check=False,
    )
    lines = [line.partition("RESULT ")[2] for line in done.stdout.splitlines() if "RESULT " in line]
    assert done.returncode == 0, done.stdout[-6000:]
    assert lines, done.stdout[-6000:]
    found: dict[str, Any] = json.loads(lines[0])
    return {**found, "output": done.stdout}
