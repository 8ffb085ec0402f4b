"""A configuration file through `paceline launch --as_accelerate`: transformers' Trainer shards with FSDP2 on CPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import pytest

from tests.unit.launch.test_unused import NOT_SHARDED, ON_TWO_CPUS, TRAINS

if TYPE_CHECKING:
    from pathlib import Path


def has_transformers() -> bool:
    try:
        return tuple(int(part) for part in version("transformers").split(".")[:2]) >= (5, 24)
    except PackageNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.compat
@pytest.mark.skipif(not has_transformers(), reason="pip install 'paceline[compat]'")
def test_the_trainer_shards_on_cpus_under_the_switch(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(TRAINS)
    (tmp_path / "run.yaml").write_text(ON_TWO_CPUS)
    command = [sys.executable, "-m", "paceline", "launch", "--quiet", "--config_file", "run.yaml", "--as-accelerate"]
    done = subprocess.run(
        [*command, "script.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    # Each rank holds its own shards, so the sums over them differ.
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("TRAINED"))
    assert lines == [f"TRAINED {rank} 2 bf16 FSDPLlamaForCausalLM 2" for rank in (0, 1)], done.stdout
    assert NOT_SHARDED not in done.stdout
    assert "built neither" not in done.stdout
