"""`paceline config` at a pseudo-terminal: arrow keys, going back, Ctrl-C."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest
import yaml

from tests.support.terminal import CTRL_C, DOWN, ENTER, ESCAPE, LEFT, UP, Terminal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def terminal(tmp_path: Path, home: Path) -> Iterator[Terminal]:
    """The questionnaire of a machine without accelerators."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PACELINE_", "SLURM_"))}
    env = {**kept, "PACELINE_HOME": str(home), "CUDA_VISIBLE_DEVICES": ""}
    with Terminal([sys.executable, "-m", "paceline", "config"], env=env, cwd=tmp_path) as terminal:
        yield terminal


def test_arrow_keys_and_going_back(terminal: Terminal, home: Path) -> None:
    terminal.answer("num_machines", ENTER)
    terminal.answer("num_processes", "2", ENTER)
    screen = terminal.wait_for("FSDP2: the model is sharded over the devices")
    assert "num_processes: 2" in screen, "what was answered can still be seen"
    assert "single" not in screen, "two processes cannot be a single one"
    terminal.press(ESCAPE)
    terminal.answer("num_processes", "3", ENTER)
    terminal.answer("strategy", DOWN, DOWN, UP, DOWN, ENTER)  # auto, ddp, fsdp
    terminal.answer("fsdp_offload_params", LEFT)
    terminal.answer("strategy", DOWN, DOWN, ENTER)
    terminal.answer("fsdp_offload_params", UP, ENTER)
    terminal.answer("fsdp_auto_wrap_policy", DOWN, ENTER)  # below none
    terminal.answer("fsdp_transformer_layer_cls_to_wrap", ENTER)  # a class is needed
    terminal.wait_for("needs the name of a class")
    terminal.press("Block,Head" + ENTER)
    terminal.answer("fsdp_activation_checkpointing", ENTER)
    terminal.answer("fsdp_state_dict_type", ENTER)
    terminal.answer("mixed_precision", ENTER)
    terminal.answer("gradient_accumulation_steps", "0", ENTER)
    terminal.wait_for("at least 1")
    terminal.press("\x7f4" + ENTER)
    screen = terminal.wait_for("Write this?")
    assert "fsdp_offload_params: true" in screen
    assert not home.exists(), "nothing is written before the end"
    terminal.press(ENTER)
    assert terminal.end() == 0
    written = yaml.safe_load((home / "default_config.yaml").read_text())
    assert written == {
        "strategy": "fsdp",
        "mixed_precision": "no",
        "gradient_accumulation_steps": 4,
        "num_processes": 3,
        "num_machines": 1,
        "fsdp_config": {
            "fsdp_offload_params": True,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_transformer_layer_cls_to_wrap": "Block,Head",
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
            "fsdp_activation_checkpointing": False,
        },
    }


@pytest.mark.parametrize("at", ["num_machines", "strategy"])
def test_an_interrupt_leaves_everything_as_it_was(terminal: Terminal, home: Path, at: str) -> None:
    home.mkdir()
    file = home / "default_config.yaml"
    file.write_text("num_processes: 1\n")
    if at == "strategy":
        terminal.answer("num_machines", ENTER)
        terminal.answer("num_processes", "2", ENTER)
    terminal.answer(at, CTRL_C)
    assert terminal.end() == 130
    assert "nothing was written" in terminal.screen
    assert [path.name for path in home.iterdir()] == ["default_config.yaml"]
    assert file.read_text() == "num_processes: 1\n"


@pytest.mark.slow
def test_the_old_file_is_kept_and_the_end_can_be_declined(terminal: Terminal, home: Path) -> None:
    home.mkdir()
    file = home / "default_config.yaml"
    file.write_text("num_processes: 1\n")
    terminal.answer("num_machines", ENTER)
    terminal.answer("num_processes", "1", ENTER)
    terminal.answer("mixed_precision", DOWN, ENTER)
    terminal.answer("gradient_accumulation_steps", ENTER)
    terminal.wait_for("is kept as default_config.yaml.bak")
    terminal.press(LEFT)
    terminal.answer("gradient_accumulation_steps", ENTER)
    terminal.wait_for("? file: Write this?")
    terminal.press(DOWN)
    terminal.press(DOWN)
    terminal.press(ENTER)
    assert terminal.end() == 0
    assert "Nothing was written." in terminal.screen
    assert [path.name for path in home.iterdir()] == ["default_config.yaml"]
