"""Pods of a Kubernetes job: what the operator sets is all that a launch is told."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest

from tests.ranks.test_slurm import TRAIN
from tests.support.ranks import free_port

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.slow
def test_two_pods_train_together(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(textwrap.dedent(TRAIN))
    names = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "PET_NNODES": "2", "PET_NPROC_PER_NODE": "1"}
    names |= {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(free_port())}
    env = {name: value for name, value in os.environ.items() if not name.startswith("PACELINE_")} | names
    # The training operator sets these too, and counts pods by them.
    pods = [{"PET_NODE_RANK": str(pod), "RANK": str(pod), "WORLD_SIZE": "2"} for pod in range(2)]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "paceline", "launch", "--cpu", "train.py"],
            cwd=tmp_path, env={**env, **pod}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for pod in pods
    ]  # fmt: skip
    for rank, process in enumerate(running):
        said, _ = process.communicate(timeout=800)
        assert process.returncode == 0, said
        assert f"rank {rank}/2 node {rank}/2: 2.1213" in said, said
