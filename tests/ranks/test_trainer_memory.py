"""Memory that runs out on one of several ranks: all begin again with smaller micro-batches, and the same steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.trainer import farthest

FSDP = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["Block"]}}
ZERO = {
    "deepspeed": {
        "zero_optimization": {"stage": 2},
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
}


def launch(folder: Path, where: str, changes: dict[str, Any], restarts: int) -> subprocess.CompletedProcess[str]:
    changes = {"global_batch_size": 16, "per_device_train_batch_size": 8, "max_steps": 8, **changes}
    root = Path(__file__).parents[2]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PACELINE_")}
    said = ["--cpu", "--num_processes", "2", "--max_restarts", str(restarts)]
    words = [str(root / "tests" / "ranks" / "hungry_script.py"), str(folder), where, json.dumps(changes)]
    return subprocess.run(
        [sys.executable, "-m", "paceline", "launch", *said, *words],
        env=clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "HOME": str(folder.parent)},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )


def told(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "log.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, FSDP, ZERO], ids=["ddp", "fsdp", "deepspeed"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_all_ranks_begin_again_with_smaller_batches(where: str, changes: dict[str, Any], tmp_path: Path) -> None:
    if changes is ZERO:
        pytest.importorskip("deepspeed", reason="pip install 'paceline[deepspeed]'")
    plain, found = tmp_path / "plain", tmp_path / "found"
    done = launch(plain, "nowhere", changes, 0)
    assert done.returncode == 0, done.stderr[-3000:]
    # What an earlier launch noted is of no concern.
    found.mkdir()
    (found / "auto_batch_size.json").write_text('{"per_device_train_batch_size": 1}', encoding="utf-8")
    done = launch(found, where, {**changes, "auto_find_batch_size": True}, 3)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Out of memory on rank 1: restarting with micro-batches of 2." in done.stderr
    assert told(plain)["plan"] == [8, 1]
    assert (told(found)["plan"], told(found)["restarts"]) == ([2, 4], "2")
    assert farthest(told(plain)["log"], told(found)["log"]) < 1e-5


@pytest.mark.slow
def test_a_launcher_that_starts_too_seldom(tmp_path: Path) -> None:
    changes = {"auto_find_batch_size": True}
    done = launch(tmp_path / "never", "forward", changes, 0)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "for 2 rank(s) under ddp, but the launcher does not restart ranks (max_restarts is 0)" in done.stderr
    done = launch(tmp_path / "once", "backward", changes, 1)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "out of memory in backward" in done.stderr
    assert "max_restarts (1) is used up" in done.stderr
