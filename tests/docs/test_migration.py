"""The Python of the migration page: it can be read, and the whole script runs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import paceline
from paceline.compat.install import VERSION

PAGE = Path(__file__).parents[2] / "docs" / "migration.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def test_blocks_and_names_are_real() -> None:
    for block in BLOCKS:
        ast.parse(block)
    for name in re.findall(r"from paceline import ([\w, ]+)", TEXT):
        assert {part.strip() for part in name.split(",")} <= set(paceline.__all__)
    methods = set(re.findall(r"`accelerator\.(\w+)", TEXT))
    assert methods
    assert not [name for name in methods if not hasattr(paceline.Accelerator, name)]
    assert f'`importlib.metadata.version("accelerate")` answers {VERSION}' in TEXT


def test_the_whole_script_runs(tmp_path: Path) -> None:
    [script] = [block for block in BLOCKS if block.startswith("# train.py")]
    (tmp_path / "train.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "-m", "paceline", "launch", "--quiet", "--cpu", "--num_processes", "1", "train.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("loss ")
    assert (tmp_path / "runs" / "migrated").is_dir()
