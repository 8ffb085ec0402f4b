"""DeepSpeed's own launchers for real: pdsh, Open MPI and MPICH reach two hosts by ssh, whose ranks train together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.support.engines import needs_deepspeed
from tests.support.ranks import free_port
from tests.support.shells import ADDRESSES, Shells, needs_shells, shells

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [needs_deepspeed, pytest.mark.slow]

MPI = {"openmpi": "mpirun.openmpi", "mpich": "mpirun.mpich"}
WORDS = ["two words", "$HOME", 'a "quote"', "it's; true"]

# Each rank notes in a file of its own: the lines of two hosts may meet on a terminal.
SCRIPT = """
    import json, os, sys, time
    from pathlib import Path
    import torch
    from torch import nn
    from paceline import Accelerator

    accelerator = Accelerator()
    model = nn.Linear(2, 1, bias=False)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.backward(model(torch.full((1, 2), 1.0 + accelerator.process_index)).sum())
    norm = accelerator.clip_grad_norm_(model.parameters(), float("inf"))
    optimizer.step()
    world = accelerator.strategy.context.world
    stage = accelerator.strategy.settings["zero_optimization"]["stage"]
    note = {"ranks": [world.rank, world.size], "local": world.local_rank, "arguments": sys.argv[1:],
            "norm": round(float(norm), 4), "zero": stage, "pid": os.getpid()}
    Path(f"note-{world.rank}.part").write_text(json.dumps(note))
    Path(f"note-{world.rank}.part").rename(f"note-{world.rank}")
    if sys.argv[1:] == ["fail"] and world.rank == 1:
        raise ValueError("the culprit")
    if sys.argv[1:] == ["stay"]:
        time.sleep(600)
"""


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Shells]:
    (tmp_path / "keys").mkdir()
    (tmp_path / "train.py").write_text(textwrap.dedent(SCRIPT))
    (tmp_path / "hosts").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    with shells(tmp_path / "keys") as running:
        yield running


def start(folder: Path, hosts: Shells, launcher: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PACELINE_")}
    environment |= {"PATH": f"{hosts.programs}{os.pathsep}{environment['PATH']}", "OMP_NUM_THREADS": "1"}
    environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    if launcher in MPI:
        # `mpirun` is one of the two.
        program = hosts.programs / "mpirun"
        program.write_text(f'#!/bin/sh\nexec {shutil.which(MPI[launcher])} "$@"\n')
        program.chmod(0o755)
    command = [sys.executable, "-m", "paceline", "launch", "--cpu", "--use_deepspeed", "--zero_stage", "3"]
    command += ["--num_machines", "2", "--deepspeed_hostfile", "hosts", "--deepspeed_multinode_launcher", launcher]
    command += ["--main_process_port", str(free_port()), "train.py", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def notes(folder: Path) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in (folder / "note-0", folder / "note-1") if path.exists()]


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param("pdsh", marks=needs_shells("pdsh")),
        pytest.param("openmpi", marks=needs_shells("mpirun.openmpi")),
        pytest.param("mpich", marks=needs_shells("mpirun.mpich")),
    ],
)
def test_two_hosts_train_together(launcher: str, hosts: Shells, tmp_path: Path) -> None:
    out, _ = (process := start(tmp_path, hosts, launcher, *WORDS)).communicate(timeout=800)
    assert process.returncode == 0, out
    found = notes(tmp_path)
    assert [note["ranks"] for note in found] == [[0, 2], [1, 2]], out
    for note in found:
        # The mean of (1, 1) and (2, 2).
        assert (note["arguments"], note["norm"], note["zero"]) == (WORDS, 2.1213, 3)


@pytest.mark.parametrize(
    "launcher",
    [pytest.param("pdsh", marks=needs_shells("pdsh")), pytest.param("openmpi", marks=needs_shells("mpirun.openmpi"))],
)
def test_a_failure_on_another_host_is_told(launcher: str, hosts: Shells, tmp_path: Path) -> None:
    out, _ = (process := start(tmp_path, hosts, launcher, "fail")).communicate(timeout=800)
    assert process.returncode != 0, out
    assert "ValueError: the culprit" in out
    assert f"{launcher} exited with code" in out


@needs_shells("pdsh")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def test_a_signal_ends_the_ranks_on_every_host(number: signal.Signals, hosts: Shells, tmp_path: Path) -> None:
    process = start(tmp_path, hosts, "pdsh", "stay")
    deadline = time.monotonic() + 240
    while len(notes(tmp_path)) < 2:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the ranks do not come up"
        time.sleep(0.1)
    pids = [int(str(note["pid"])) for note in notes(tmp_path)]
    process.send_signal(number)
    out, _ = process.communicate(timeout=800)
    assert process.returncode == 128 + number, out
    assert f"stopped by {number.name}" in out
    deadline = time.monotonic() + 60
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < deadline, "a rank was left behind"
        time.sleep(0.1)
