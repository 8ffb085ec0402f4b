"""Ranks that a real mpirun starts: around `paceline launch`, around the script, and called by `paceline launch`."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from paceline.config import resolve
from paceline.errors import PREEMPTED, ConfigError, UsageError
from paceline.launch.command import Command
from paceline.launch.schedulers.mpirun import plan_mpirun
from tests.support.marked import none_marked

if TYPE_CHECKING:
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
    from paceline.environment.world import World
    world = World.read(os.environ)
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
        command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=800
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
    assert "mpirun exited with code" in said


KINDS = {"intel": "Intel(R) MPI", "mpich": "HYDRA build details"}


@pytest.fixture(params=KINDS)
def other_mpirun(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the mpirun of another MPI the first in PATH; skip where it is not installed."""
    words = KINDS[request.param]
    places = [
        shutil.which("mpirun"),
        shutil.which("mpirun.mpich"),
        str(Path(sys.executable).with_name("mpirun")),
        f"{os.environ.get('I_MPI_ROOT', '')}/bin/mpirun",
    ]
    program = tmp_path / "bin" / "mpirun"
    program.parent.mkdir()
    program.touch(0o755)
    for place in filter(None, places):
        # Intel's is a shell script that looks for the rest of it in PATH.
        program.write_text(f'#!/bin/sh\nPATH="{Path(place).parent}:$PATH"\nexec {place} "$@"\n')
        if (
            Path(place).is_file()
            and words in subprocess.run([program, "--version"], capture_output=True, text=True).stdout
        ):
            break
    else:
        pytest.skip(f"needs the mpirun of {request.param} (Debian: mpich; PyPI: impi-rt)")
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


@pytest.mark.slow
@pytest.mark.usefixtures("other_mpirun")
def test_other_kinds_of_mpi(tmp_path: Path) -> None:
    flags = ("--cpu", "--gradient_accumulation_steps", "3")
    code, said = run(tmp_path, "mpirun", "-n", "2", *PACELINE, "launch", *flags, "train.py", "two words")
    assert code == 0, said
    assert "rank 1/2 by pmi: 2.1213 ['two words'] 3" in said, said
    code, said = run(tmp_path, "mpirun", "-n", "4", sys.executable, "train.py")
    assert code == 0, said
    assert "rank 3/4 by pmi: 3.5355" in said, said
    (tmp_path / "hosts").write_text("localhost:2\n")
    called = (*PACELINE, "launch", "--cpu", "--num_processes", "2", "--mpirun_hostfile", "hosts", "--mpirun_ccl", "4")
    code, said = run(tmp_path, *called, "train.py", "two words")
    assert code == 0, said
    assert "rank 1/2 by pmi: 2.1213 ['two words'] 1 4" in said, said
    code, said = run(tmp_path, *called, "train.py", "fail")
    assert (code, said.count("ValueError: the culprit")) == (1, 1), said


@pytest.mark.slow
@pytest.mark.usefixtures("other_mpirun")
def test_a_signal_reaches_the_ranks_of_other_kinds_of_mpi(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))\n"
        "os.write(1, b'ready\\n')\n"
        "time.sleep(1000)\n"
    )
    marker = uuid.uuid4().hex
    process = subprocess.Popen(
        [*PACELINE, "launch", "--cpu", "--num_processes", "2", "--mpirun_ccl", "1", "train.py"],
        cwd=tmp_path, env={**os.environ, "TEST_MARKER": marker}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    heard = ""
    while heard.count("ready") < 2:
        line = process.stdout.readline()
        assert line, heard
        heard += line
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=800)
    assert process.returncode == PREEMPTED, said
    assert none_marked(marker, 60)


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
    with pytest.raises(ConfigError, match="num_processes: it is required with a host file"):
        planned()
    with pytest.raises(ConfigError, match="there is no host file nowhere"):
        planned(mpirun_hostfile="nowhere", num_processes="4")
    env["PATH"] = str(tmp_path)
    with pytest.raises(UsageError, match="There is no program 'mpirun'"):
        planned(num_processes="4")
