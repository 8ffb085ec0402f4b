"""`paceline`, its help, and `paceline env`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

import paceline as package
from paceline.config import options

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.cli.conftest import Paceline


def test_the_help_lists_the_commands(paceline: Paceline) -> None:
    for arguments in (["--help"], ["-h"]):
        answer = paceline(*arguments)
        assert answer.code == 0
        assert "launch  " in answer.out
        assert "env  " in answer.out


def test_the_version(paceline: Paceline) -> None:
    assert paceline("--version").out == f"paceline, version {package.__version__}\n"


def test_an_unknown_command(paceline: Paceline) -> None:
    answer = paceline("lunch", "train.py")
    assert answer.code == 2
    assert "lunch" in answer.err


def test_the_help_of_launch_shows_every_flag_by_topic(paceline: Paceline) -> None:
    answer = paceline("launch", "--help")
    assert answer.code == 0
    missing = [option.flag for option in options() if f"--{option.flag} " not in answer.out]
    assert not missing
    topics = [line for line in answer.lines if line.endswith(":") and not line.startswith(" ")]
    assert topics[0] == "What runs where:"
    assert {"FSDP:", "DDP:", "DeepSpeed:", "Mesh:", "torch.compile:", "The command:"} <= set(topics)
    assert topics[-1] == "The command:"


def test_the_help_of_env(paceline: Paceline) -> None:
    answer = paceline("env", "--help")
    assert answer.code == 0
    assert "--json" in answer.out


def test_env_as_text_and_json(paceline: Paceline) -> None:
    text = paceline("env")
    assert text.code == 0
    assert torch.__version__ in text.out
    answer = paceline("env", "--json")
    assert answer.code == 0
    report = json.loads(answer.out)
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["paceline"]
    assert report["config_file"] == ""


def test_env_shows_what_is_wrong_and_still_ends_well(
    paceline: Paceline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.yaml").write_text("mixed_precison: bf16\n")
    monkeypatch.setenv("PACELINE_CONFIG_FILE", "mine.yaml")
    answer = paceline("env", "--json")
    assert answer.code == 0
    report = json.loads(answer.out)
    assert report["config_file"] == "mine.yaml"
    assert "did you mean mixed_precision?" in report["config_problems"][0]
