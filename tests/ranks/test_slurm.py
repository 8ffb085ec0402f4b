"""Jobs of a real Slurm: no flags inside one, and the script that puts one there and back into the queue."""

from __future__ import annotations

import re
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.slurm import NODES, Slurm, running_slurm, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

PACELINE = (sys.executable, "-m", "paceline")

TRAIN = """
    import sys
    import torch
    from torch import nn
    from paceline import Accelerator

    accelerator = Accelerator(cpu=True)
    model = nn.Linear(2, 1, bias=False)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.backward(model(torch.full((1, 2), 1.0 + accelerator.process_index)).sum())
    norm = accelerator.clip_grad_norm_(model.parameters(), float("inf"))
    import os
    from paceline.environment.world import World
    world = World.read(os.environ)
    print(f"rank {world.rank}/{world.size} node {world.node_rank}/{world.num_nodes}: {norm.item():.4f}", sys.argv[1:])
"""

# Trains until it is asked to make room, once; goes on where it was when it is started again.
LONG = """
    import os, sys, time
    import torch
    from torch import nn
    from paceline import Accelerator, ProjectConfiguration

    state = os.path.join(os.path.dirname(os.path.abspath(__file__)), "state")
    again = os.environ.get("SLURM_RESTART_COUNT")
    accelerator = Accelerator(cpu=True, project_config=ProjectConfiguration(project_dir=state, automatic_checkpoint_naming=True))
    model = nn.Linear(1, 1)
    loader = torch.utils.data.DataLoader(torch.arange(4000.0).reshape(-1, 1), batch_size=1)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0), loader)
    if again:
        accelerator.load_state()
    for count, batch in enumerate(loader):
        accelerator.backward(model(batch).sum())
        optimizer.step()
        optimizer.zero_grad()
        if count == 0:
            # In one piece: both ranks write into the job's log.
            sys.stdout.write(f"first row {int(batch.max())} restart {again}\\n")
            sys.stdout.flush()
        if again:
            break
        time.sleep(0.02)
"""  # noqa: E501


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    # The path of a socket may have about a hundred letters, and pytest's folders are longer.
    with tempfile.TemporaryDirectory(prefix="slurm") as folder:
        yield from running_slurm(Path(folder))


def write(folder: Path, text: str) -> str:
    (folder / "train.py").write_text(textwrap.dedent(text))
    return "train.py"


def wait_for_end(log: Path, words: str) -> str:
    """Wait until a job has written these words; `sbatch --wait` itself looks every ten seconds."""
    try:
        wait_for(lambda: log.exists() and words in log.read_text(), f"{words!r} in the log")
    finally:
        text = log.read_text() if log.exists() else "there is no log"
        print(text)
    return text


def test_each_task_is_a_rank(slurm: Slurm, tmp_path: Path) -> None:
    script = write(tmp_path, TRAIN)
    said = slurm.run("srun", "--ntasks=2", "--nodes=1", *PACELINE, "launch", script, "two words", cwd=tmp_path)
    for rank in range(2):
        # The mean of (1, 1) and (2, 2).
        assert f"rank {rank}/2 node 0/1: 2.1213 ['two words']" in said, said


@pytest.mark.slow
def test_the_script_alone_finds_the_other_tasks(slurm: Slurm, tmp_path: Path) -> None:
    script = write(tmp_path, TRAIN)
    said = slurm.run("srun", "--ntasks=2", "--nodes=2", sys.executable, script, cwd=tmp_path)
    for rank in range(2):
        assert f"rank {rank}/2 node {rank}/2: 2.1213" in said, said


def test_what_slurm_says_is_shown_with_its_origin(slurm: Slurm) -> None:
    said = slurm.run("srun", "--nodes=2", "--ntasks-per-node=1", "--label", *PACELINE, "config", "show")
    for rank in range(2):
        assert re.search(rf"{rank}: num_machines +2 +Slurm \(SLURM_STEP_NUM_NODES\)", said), said
        assert re.search(rf"{rank}: machine_rank +{rank} +Slurm \(SLURM_NODEID\)", said), said
        assert re.search(rf"{rank}: main_process_ip +{NODES[0]} +Slurm \(the job's first machine\)", said), said


def test_a_machine_rank_that_the_shell_filled_in_too_early_is_found(slurm: Slurm) -> None:
    command = (*PACELINE, "config", "show", "--num_machines", "2", "--machine_rank", "0")
    said = slurm.run("srun", "--nodes=2", "--ntasks-per-node=1", *command, check=False)
    assert "--machine_rank: 0 contradicts 1 from Slurm (SLURM_NODEID)" in said, said


@pytest.mark.slow
def test_one_launcher_on_each_machine(slurm: Slurm, tmp_path: Path) -> None:
    script = write(tmp_path, TRAIN)
    command = ("srun", "--nodes=2", "--ntasks-per-node=1", *PACELINE, "launch", "--cpu", "--num_processes", "2")
    said = slurm.run(*command, script, "two words", cwd=tmp_path)
    for rank in range(2):
        assert f"rank {rank}/2 node {rank}/2: 2.1213 ['two words']" in said, said


def test_a_batch_script_on_several_machines_needs_srun(slurm: Slurm, tmp_path: Path) -> None:
    script = write(tmp_path, "")
    line = f"{' '.join(PACELINE)} launch {script}"
    said = slurm.run("sbatch", "--nodes=2", "--output=log", f"--wrap={line}", cwd=tmp_path)
    log = wait_for_end(tmp_path / "log", "--num_machines 1")
    assert f"Slurm has allocated 2 machines to this job ({','.join(NODES)})" in log, said + log
    assert "srun --ntasks-per-node=1 paceline launch" in log


@pytest.mark.slow
def test_a_batch_script_on_one_machine_needs_none(slurm: Slurm, tmp_path: Path) -> None:
    script = write(tmp_path, TRAIN)
    line = f"{' '.join(PACELINE)} launch --cpu --num_processes 2 {script}"
    slurm.run("sbatch", "--ntasks=4", "--output=log", f"--wrap={line}", cwd=tmp_path)
    wait_for_end(tmp_path / "log", "rank 0/2 node 0/1: 2.1213")


@pytest.mark.slow
def test_a_submitted_job_makes_room_and_goes_on_from_the_queue(slurm: Slurm, tmp_path: Path) -> None:
    script = write(tmp_path, LONG)
    flags = (
        "--slurm",
        "--slurm_time",
        "10",
        "--slurm-option",
        "cpus-per-task=2",
        "--log_dir",
        str(tmp_path / "job"),
        "--tee",
    )
    said = slurm.run(*PACELINE, "launch", *flags, "--cpu", "--num_processes", "2", script, cwd=tmp_path)
    found = re.search(r"submitted job (\d+)", said)
    assert found is not None, said
    log = tmp_path / "job" / f"{found[1]}.log"
    assert f"tail -F {log}" in said

    def text() -> str:
        return log.read_text() if log.exists() else ""

    wait_for(lambda: text().count("restart None") == 2, "the first step")
    slurm.run("scancel", "--signal=USR1", found[1])
    try:
        wait_for(lambda: "restart 1" in text(), "the second start", 400)
        wait_for(lambda: slurm.run("squeue", "--noheader", "--job", found[1]) == "", "its end")
    finally:
        print(text())
    rows = [int(row) for row in re.findall(r"first row (\d+) restart", text())]
    firsts, seconds = rows[:2], rows[2:]
    assert min(firsts) == 0
    assert min(seconds) > max(firsts)
    kept = {path.name for path in (tmp_path / "job").glob("rank_*.out")}
    assert kept == {f"rank_{rank}{again}.out" for rank in range(2) for again in ("", ".requeue_1")}
