"""`paceline launch` for real, in processes of their own: exit codes, tracebacks, arguments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from paceline.cli.script_checks.script_runs import without_logs

if TYPE_CHECKING:
    from pathlib import Path


def launch(folder: Path, source: str, *arguments: str, flags: tuple[str, ...] = ()) -> tuple[int, str, str]:
    (folder / "train.py").write_text(source)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PACELINE_")}
    command = [sys.executable, "-m", "paceline", "launch", "--cpu", *flags, "train.py", *arguments]
    done = subprocess.run(
        command,
        cwd=folder,
        env=clean | {"OMP_NUM_THREADS": "1", "HOME": str(folder / "home")},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_arguments_arrive_as_they_were_given(tmp_path: Path) -> None:
    arguments = ["--num_processes", "7", "--cpu", "two words", "", "--", "-m", "$HOME"]
    source = "import json, os, sys\nprint(json.dumps([os.environ['WORLD_SIZE'], sys.argv, __name__]))\n"
    code, out, err = launch(tmp_path, source, *arguments, flags=("--num_processes", "1"))
    assert code == 0, err
    assert json.loads(out) == ["1", ["train.py", *arguments], "__main__"]
    assert err == "paceline: the script gets --num_processes: flags of the launcher come before the script\n"


def test_an_exception_is_shown_once_and_last(tmp_path: Path) -> None:
    source = "def inner():\n    raise KeyError('the culprit')\ninner()\n"
    code, out, err = launch(tmp_path, source, flags=("--num_processes", "2"))
    assert code == 1
    assert out == ""
    assert err.rstrip().splitlines()[-1] == "KeyError: 'the culprit'"
    assert err.count("Traceback (most recent call last)") == 1
    assert err.count("raise KeyError('the culprit')") == 1
    assert "elastic" not in err


@pytest.mark.parametrize(("statement", "wanted"), [("sys.exit(3)", 3), ("sys.exit(0)", 0)])
def test_the_scripts_exit_code_is_the_launchers(tmp_path: Path, statement: str, wanted: int) -> None:
    code, _, err = launch(tmp_path, f"import sys\n{statement}\n", flags=("--num_processes", "1"))
    assert code == wanted, err


def test_problems_keep_the_script_from_starting(tmp_path: Path) -> None:
    code, out, err = launch(
        tmp_path, "open('it_ran', 'w').close()\n", flags=("--mixed_precision", "fp7", "--zero_stage", "2")
    )
    assert code == 2
    assert out == ""
    assert "2 problems" in err
    assert not (tmp_path / "it_ran").exists()


def test_a_report_names_no_files_that_are_gone() -> None:
    report = "rank 0 on a (pid 7) raised ValueError at a.py:1; its output is in /tmp/x/rank_0.err\n\nTraceback"
    told = "rank 0 on a (pid 7) raised ValueError at a.py:1; --keep FOLDER keeps its output\n\nTraceback"
    assert without_logs(report) == told
