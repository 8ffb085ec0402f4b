"""Workers of a real Ray cluster on this machine."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest

from paceline.errors import ConfigError, MissingExtraError
from paceline.launch.ray import ray_trainer

if TYPE_CHECKING:
    from pathlib import Path

HAS_RAY = importlib.util.find_spec("ray") is not None

SCRIPT = """
    import os, sys
    import ray
    from ray.train import RunConfig
    from paceline.launch.ray import ray_trainer

    def loop(config):
        import torch
        from torch import nn
        from paceline import Accelerator

        accelerator = Accelerator()
        model = nn.Linear(2, 1, bias=False)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        accelerator.backward(model(torch.full((1, 2), 1.0 + accelerator.process_index)).sum())
        norm = accelerator.clip_grad_norm_(model.parameters(), float("inf"))
        from paceline.environment.world import World
        world = World.read(os.environ)
        said = f"rank {world.rank}/{world.size} node {world.node_rank}/{world.num_nodes}: {norm.item():.4f}"
        with open(f"{config['folder']}/said-{world.rank}", "w") as file:
            file.write(f"{said} {accelerator.gradient_accumulation_steps} {accelerator.device}")

    if __name__ == "__main__":
        ray.init(address="local", num_cpus=4, include_dashboard=False)
        trainer = ray_trainer(
            loop, num_workers=2, settings={"gradient_accumulation_steps": 3, "strategy": "ddp"},
            train_loop_config={"folder": os.getcwd()},
            run_config=RunConfig(storage_path=os.path.join(os.getcwd(), "storage")),
        )
        trainer.fit()
        assert "PACELINE_CONFIG" not in os.environ
"""


@pytest.mark.slow
@pytest.mark.skipif(not HAS_RAY, reason="needs Ray, which is not installed (pip install 'paceline[ray]')")
def test_workers_train_together(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(textwrap.dedent(SCRIPT))
    env = {name: value for name, value in os.environ.items() if not name.startswith("PACELINE_")}
    # Its workers and their imports take minutes on a busy machine; by itself it starts them anew after one.
    env["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "300"
    done = subprocess.run(
        [sys.executable, "train.py"], cwd=tmp_path, env=env, text=True, timeout=800, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    for rank in range(2):
        # The mean of (1, 1) and (2, 2).
        assert (tmp_path / f"said-{rank}").read_text() == f"rank {rank}/2 node 0/1: 2.1213 3 cpu"


@pytest.mark.skipif(HAS_RAY, reason="Ray is installed")
def test_without_ray_the_command_that_installs_it_is_named() -> None:
    with pytest.raises(MissingExtraError, match=r"paceline\[ray\]"):
        ray_trainer(print, num_workers=2)


def test_another_number_of_ranks_is_a_contradiction() -> None:
    with pytest.raises(ConfigError, match=r"4 contradicts 2 from ray_trainer\(num_workers=…\)"):
        ray_trainer(print, num_workers=2, settings={"num_processes": 4})
