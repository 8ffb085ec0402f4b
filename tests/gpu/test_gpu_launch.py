"""What starts processes on accelerators: notebooks, the installation's own test, and a search for a batch that fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.trainer import farthest

ROOT = Path(__file__).parents[2]

# The parent holds the device itself: a forked child could not use it.
NOTEBOOK = """
import json
import torch
from paceline import notebook_launcher

def train(scale):
    from paceline import Accelerator
    accelerator = Accelerator()
    total = accelerator.reduce(torch.full((2,), scale, device=accelerator.device), "sum")
    return accelerator.process_index, str(accelerator.device), total.tolist()

print(torch.ones(3, device="cuda").sum().item())
print(json.dumps(notebook_launcher(train, (3.0,))))
"""


def python(*words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=280, check=False, env=environment, **more
    )


@pytest.mark.gpus2
def test_a_notebook_that_has_used_its_device(tmp_path: Path) -> None:
    import torch

    program = tmp_path / "program.py"
    program.write_text(NOTEBOOK)
    done = python(str(program))
    assert done.returncode == 0, done.stderr
    first, results = done.stdout.splitlines()[0], json.loads(done.stdout.splitlines()[-1])
    count = torch.cuda.device_count()
    assert first == "3.0"
    assert results == [[rank, f"cuda:{rank}", [3.0 * count] * 2] for rank in range(count)]


@pytest.mark.gpus2
def test_the_installation_on_all_devices(tmp_path: Path) -> None:
    done = python("-m", "paceline", "test", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["passed"]
    assert {"auto, no", "fsdp, no"} <= {check["section"] for check in told["checks"]}, told


@pytest.mark.gpus2
@pytest.mark.parametrize("changes", [{}, {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["Block"]}}],
                         ids=["ddp", "fsdp"])  # fmt: skip
def test_a_device_that_is_too_small_for_the_batch(changes: dict[str, Any], tmp_path: Path) -> None:
    wanted = {
        "use_cpu": False,
        "global_batch_size": 16,
        "per_device_train_batch_size": 8,
        "max_steps": 6,
        "learning_rate": 1e-5,
        **changes,
    }
    told = []
    for name, limit, more in (("plain", "unlimited", {}), ("found", "limited", {"auto_find_batch_size": True})):
        script = [str(ROOT / "tests/gpu/wide_script.py"), str(tmp_path / name), limit, json.dumps({**wanted, **more})]
        done = python("-m", "paceline", "launch", "--num_processes", "2", "--max_restarts", "2", *script)
        assert done.returncode == 0, done.stderr[-3000:]
        told.append(json.loads((tmp_path / name / "log.json").read_text(encoding="utf-8")))
    assert "Out of memory on rank 1: restarting with micro-batches of 4." in done.stderr
    assert [(t["plan"], t["restarts"]) for t in told] == [([8, 1], "0"), ([4, 2], "1")]
    assert farthest(told[0]["log"], told[1]["log"]) < 1e-4
