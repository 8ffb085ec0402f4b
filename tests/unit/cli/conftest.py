"""The command line, called in this process, in a folder and with a home of its own."""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from paceline.cli import main

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Paceline = Callable[..., "Answer"]


@dataclass(frozen=True)
class Answer:
    """What a call printed and how it ended."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    @property
    def variables(self) -> dict[str, str]:
        """What a dry run says that all ranks get."""
        begin = self.lines.index("for all:") + 1
        found = {}
        for line in self.lines[begin:]:
            if line.startswith("rank "):
                break
            name, _, value = line.strip().partition("=")
            found[name] = shlex.split(value)[0] if value else ""
        return found

    @property
    def config(self) -> dict[str, Any]:
        """The configuration that a dry run hands to the ranks."""
        config: dict[str, Any] = json.loads(self.variables["PACELINE_CONFIG"])["config"]
        return config

    @property
    def commands(self) -> list[list[str]]:
        """What each rank of a dry run would run, without its variables and the interpreter."""
        starts = [index for index, line in enumerate(self.lines) if line.startswith("rank ")]
        words = [shlex.split(self.lines[index + 1]) for index in starts]
        return [line[line.index("-m") + 2 :] for line in words]


@pytest.fixture
def paceline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Paceline:
    """Call `paceline ARGUMENTS...` in `tmp_path`; any configuration of the machine is out of sight."""
    monkeypatch.chdir(tmp_path)
    for name in [n for n in os.environ if n.startswith("PACELINE_") or n in ("XDG_CACHE_HOME", "HF_HOME")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def call(*arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["paceline", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capfd.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return Answer(code, printed.out, printed.err)

    return call


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A script that leaves a mark when it is run."""
    path = tmp_path / "train.py"
    path.write_text("from pathlib import Path\nPath('it_ran').touch()\n")
    return path
