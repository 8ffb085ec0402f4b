"""Launchers and commands, as programs call them."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from paceline.compat.accelerate.commands import config, launch

if TYPE_CHECKING:
    from pathlib import Path


def test_a_file_is_read_as_keys_and_values(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("distributed_type: FSDP\nfsdp_config:\n  fsdp_version: 2\n")
    loaded = config.load_config_from_file(file)
    values = loaded.to_dict()
    assert values["distributed_type"] == "FSDP"
    assert values["fsdp_config"] == {"fsdp_version": 2}
    assert loaded.distributed_type == "FSDP"
    with pytest.raises(AttributeError):
        _ = loaded.nothing
    with pytest.raises(FileNotFoundError):
        config.load_config_from_file(tmp_path / "missing.yaml")
    assert config.default_config_file.endswith("default_config.yaml")


def _command(monkeypatch: pytest.MonkeyPatch, *tokens: str, code: int = 0) -> list[str]:
    seen: list[list[str]] = []

    def call(command: list[str], **_kwargs: Any) -> int:
        seen.append(command)
        return code

    monkeypatch.setattr(subprocess, "call", call)
    launch.launch_command(launch.launch_command_parser().parse_args(list(tokens)))
    return seen[0]


def test_flags_and_arguments_reach_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = ("--num-processes", "2", "--use_fsdp", "--fsdp_offload_params", "false", "--mixed_precision=bf16")
    command = _command(monkeypatch, *tokens, "train.py", "--lr", "1e-3", "--num_processes", "9")
    assert command[:4] == [sys.executable, "-m", "paceline", "launch"]
    assert command[-5:] == ["train.py", "--lr", "1e-3", "--num_processes", "9"]
    flags = command[4:-5]
    for flag, value in {
        "--num_processes": "2",
        "--use_fsdp": "true",
        "--fsdp_offload_params": "false",
        "--mixed_precision": "bf16",
        "--as_accelerate": "true",
    }.items():
        assert flags[flags.index(flag) + 1] == value


def test_a_switch_has_no_value(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("strategy: ddp\n")
    command = _command(monkeypatch, "--config_file", str(file), "-m", "--quiet", "package.train", "-x")
    assert command[-2:] == ["package.train", "-x"]
    assert {"--module", "--quiet", "--config_file"} <= set(command)
    assert command[command.index("--config_file") + 1] == str(file)


def test_a_failed_run_ends_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as ended:
        _command(monkeypatch, "train.py", code=3)
    assert ended.value.code == 3


def test_an_unknown_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        launch.launch_command_parser().parse_args(["--nothing", "1", "train.py"])
    assert "--nothing" in capsys.readouterr().err


SCRIPT = """
import os, sys
import accelerate
from accelerate import PartialState
state = PartialState()
assert accelerate.PartialState.__module__ == "paceline.compat.accelerate.state"
print(state.process_index, state.num_processes, sys.argv[1:], flush=True)
"""


def test_a_script_runs_with_the_twin_on_all_ranks(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    tokens = ["--num_processes", "2", "--cpu", "--quiet", str(script), "--a", "b"]
    program = (
        "from paceline.compat.accelerate.commands.launch import launch_command, launch_command_parser\n"
        f"launch_command(launch_command_parser().parse_args({tokens!r}))"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=800)
    assert finished.returncode == 0, finished.stderr
    lines = sorted(line for line in finished.stdout.splitlines() if "--a" in line)
    assert [line[line.index(" 2 ") - 1 :] for line in lines] == ["0 2 ['--a', 'b']", "1 2 ['--a', 'b']"]
