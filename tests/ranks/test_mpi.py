"""Ranks that a real mpirun starts: around `paceline launch`, around the script, and called by `paceline launch`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest

from paceline.config import resolve
from paceline.errors import ConfigError, UsageError
from paceline.launch.command import Command
from paceline.launch.schedulers.mpirun import plan_mpirun

if TYPE_CHECKING:
    from pathlib import Path

    from paceline.launch.schedulers.mpirun import MpirunPlan

pytestmark = pytest.mark.skipif(
    shutil.which("mpirun") is None, reason="needs mpirun, which is not here (Debian: openmpi-bin)"
)

PACELINE = (sys.executable, "-m", "paceline")
# As root, and with more ranks than cores: allowed in tests.
MPIRUN = ("mpirun", "--oversubscribe", "--bind-to", "none")

SCRIPT = """
    import os, sys
    import torch
    from torch import nn
    from paceline import Accelerator

    accelerator = Accelerator(cpu=True)
    model = nn.Linear(2, 1, bias=False)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.backward(model(torch.full((1, 2), 1.0 + accelerator.process_index)).sum())
    norm = accelerator.clip_grad_norm_(model.parameters(), float("inf"))
    world = accelerator._parts.around.world
    print(f"rank {world.rank}/{world.size} by {world.source}: {norm.item():.4f} {sys.argv[1:]}"
          f" {accelerator.gradient_accumulation_steps} {os.environ.get('CCL_WORKER_COUNT')}", flush=True)
    if sys.argv[1:] == ["fail"] and world.rank == 1:
        raise ValueError("the culprit")
"""


def run(folder: Path, *command: str) -> tuple[int, str]:
    (folder / "train.py").write_text(textwrap.dedent(SCRIPT))
    env = {k: v for k, v in os.environ.items() if not k.startswith("PACELINE_")}
    env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=400
    )
    return done.returncode, done.stdout


def test_each_task_becomes_a_rank(tmp_path: Path) -> None:
    flags = ("--gradient_accumulation_steps", "3")
    code, said = run(tmp_path, *MPIRUN, "-np", "2", *PACELINE, "launch", "--cpu", *flags, "train.py", "two words")
    assert code == 0, said
    for rank in range(2):
        # The mean of (1, 1) and (2, 2).
        assert f"rank {rank}/2 by openmpi: 2.1213 ['two words'] 3" in said, said


@pytest.mark.slow
def test_the_script_alone_finds_the_other_tasks(tmp_path: Path) -> None:
    code, said = run(tmp_path, *MPIRUN, "-np", "4", sys.executable, "train.py")
    assert code == 0, said
    assert "rank 3/4 by openmpi: 3.5355 [] 1" in said, said


@pytest.mark.slow
def test_launch_calls_mpirun(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("localhost slots=2  # this machine\n")
    flags = ("--cpu", "--num_processes", "2", "--mpirun_hostfile", "hosts", "--mpirun_ccl", "4")
    code, said = run(tmp_path, *PACELINE, "launch", *flags, "train.py", "two words")
    assert code == 0, said
    for rank in range(2):
        assert f"rank {rank}/2 by openmpi: 2.1213 ['two words'] 1 4" in said, said


@pytest.mark.slow
def test_a_rank_that_fails_is_told(tmp_path: Path) -> None:
    code, said = run(
        tmp_path, *PACELINE, "launch", "--cpu", "--num_processes", "2", "--mpirun_ccl", "1", "train.py", "fail"
    )
    assert code != 0
    assert said.count("ValueError: the culprit") == 1, said
    assert "mpirun ended with code" in said


def test_what_would_be_started_is_shown_and_what_cannot_be_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts").write_text("# two\n\nnode1 slots=2\nnode2 slots=2\n")
    (tmp_path / "train.py").touch()
    env = {"PATH": os.environ["PATH"]}

    def planned(**flags: str) -> MpirunPlan:
        resolved = resolve(flags={"cpu": "true", "mpirun_hostfile": "hosts", **flags}, env={}, file=None)
        return plan_mpirun(resolved, Command("train.py", ("--lr", "1")), env)

    shown = planned(num_processes="4").as_text()
    assert "MASTER_ADDR=node1" in shown
    assert "mpirun -n 4 --hostfile hosts --bind-to none" in shown
    with pytest.raises(ConfigError, match="num_processes: it is not given"):
        planned()
    with pytest.raises(ConfigError, match="there is no host file nowhere"):
        planned(mpirun_hostfile="nowhere", num_processes="4")
    env["PATH"] = str(tmp_path)
    with pytest.raises(UsageError, match="There is no program 'mpirun'"):
        planned(num_processes="4")
