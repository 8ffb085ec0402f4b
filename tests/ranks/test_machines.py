"""Two machines that are one: each starts its own ranks by DeepSpeed's launcher, and they train together."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest

from tests.support.engines import needs_deepspeed
from tests.support.ranks import free_port

if TYPE_CHECKING:
    from pathlib import Path

SCRIPT = """
    import os
    import sys
    import torch
    from torch import nn
    from paceline import Accelerator

    accelerator = Accelerator()
    model = nn.Linear(2, 1, bias=False)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.backward(model(torch.full((1, 2), 1.0 + accelerator.process_index)).sum())
    norm = accelerator.clip_grad_norm_(model.parameters(), float("inf"))
    optimizer.step()
    if sys.argv[1:] != ["two words"]:
        raise ValueError(f"arguments {sys.argv[1:]}")
    from paceline.environment.world import World
    world = World.read(os.environ)
    print(f"rank {world.rank}/{world.size} node {world.node_rank}/{world.num_nodes}: {norm.item():.4f}")
"""


def launch(folder: Path, port: int, *arguments: str, machines: int) -> list[tuple[int, str, str]]:
    (folder / "train.py").write_text(textwrap.dedent(SCRIPT))
    env = {k: v for k, v in os.environ.items() if not k.startswith("PACELINE_")}
    command = [sys.executable, "-m", "paceline", "launch", "--cpu", "--use_deepspeed", "--zero_stage", "3"]
    command += ["--deepspeed_hostfile", "hosts", "--deepspeed_multinode_launcher", "nossh"]
    command += ["--main_process_ip", "127.0.0.1", "--num_machines", str(machines)] if machines > 1 else []
    command += ["--main_process_port", str(port)]
    each = [["--machine_rank", str(rank)] if machines > 1 else [] for rank in range(machines)]
    running = [
        subprocess.Popen(
            [*command, *rank, "train.py", *arguments],
            cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in each
    ]  # fmt: skip
    ended = []
    for process in running:
        out, err = process.communicate(timeout=800)
        ended.append((process.returncode, out, err))
    return ended


@needs_deepspeed
@pytest.mark.slow
def test_two_machines_train_together(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("one slots=1\ntwo slots=1\n")
    ended = launch(tmp_path, free_port(), "two words", machines=2)
    for rank, (code, out, err) in enumerate(ended):
        assert code == 0, err
        # The mean of (1, 1) and (2, 2).
        assert f"rank {rank}/2 node {rank}/2: 2.1213" in out, out


@needs_deepspeed
@pytest.mark.slow
def test_a_failure_on_a_machine_is_told(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    [(code, _out, err)] = launch(tmp_path, free_port(), machines=1)
    assert code != 0
    assert "ValueError: arguments []" in err
