"""`paceline`, its help, and `paceline env`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest
import torch

import paceline as package
from paceline.cli import command as program
from paceline.config import options

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.unit.cli.conftest import Paceline


ROOT = Path(__file__).parents[3]


def test_the_help_lists_the_commands(paceline: Paceline) -> None:
    for arguments in (["--help"], ["-h"]):
        answer = paceline(*arguments)
        assert answer.code == 0
        assert "launch  " in answer.out
        assert "env  " in answer.out


def commands(command: click.Command, parent: click.Context | None, name: str) -> Iterator[tuple[str, str]]:
    """Every command by its whole name, with its help."""
    context = click.Context(command, info_name=name, parent=parent)
    yield context.command_path, command.get_help(context)
    if isinstance(command, click.Group):
        for inner in command.list_commands(context):
            found = command.get_command(context, inner)
            assert found is not None
            yield from commands(found, context, inner)


def options_with_one_spelling(command: click.Command, parent: click.Context | None, name: str) -> Iterator[str]:
    """Flags that cannot be written with - in place of _."""
    context = click.Context(command, parent=parent, info_name=name, **command.context_settings)
    for option in command.params:
        if isinstance(option, click.Option) and context.token_normalize_func is None:
            dashed = {flag.replace("_", "-") for flag in option.opts}
            yield from (f"{context.command_path} {flag}" for flag in dashed - set(option.opts))
    if isinstance(command, click.Group):
        for inner in command.list_commands(context):
            found = command.get_command(context, inner)
            assert found is not None
            yield from options_with_one_spelling(found, context, inner)


def test_every_flag_may_be_written_with_a_dash() -> None:
    assert list(options_with_one_spelling(program, None, "paceline")) == []


def test_texts_write_flags_with_one_spelling() -> None:
    """Except where a help lists both; the flags of other programs have dashes."""
    texts = {name: re.sub(r"--\w+, --[a-z-]+", "", text) for name, text in commands(program, None, "paceline")}
    texts |= {str(page): page.read_text() for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
    own = {"dry_run", *(option.flag for option in options() if "_" in option.flag)}
    found = {(name, word) for name, text in texts.items() for word in re.findall(r"--[a-z]+-[a-z-]+", text)}
    assert not {(name, word) for name, word in found if word[2:].replace("-", "_") in own}
    assert "paceline launch --dry_run train.py" in texts["paceline"]


def test_every_command_shows_how_it_is_used() -> None:
    bare = [path for path, text in commands(program, None, "paceline") if f"  {path} " not in f"{text} "]
    assert [path for path in bare if path not in ("paceline", "paceline env", "paceline config")] == []


def test_the_help_is_grouped_and_ends_with_examples(paceline: Paceline) -> None:
    out = paceline("--help").out
    order = [out.index(f"{topic}:") for topic in ("Start", "Check", "Inspect", "More", "Examples")]
    assert order == sorted(order)
    for command in ("launch", "config", "env", "test", "parity", "verify-resume", "report", "checkpoint", "completion"):
        assert out.count(f"\n  {command} ") == 1, command


def test_the_version(paceline: Paceline) -> None:
    assert paceline("--version").out == f"paceline, version {package.__version__}\n"


def test_an_unknown_command(paceline: Paceline) -> None:
    answer = paceline("lunch", "train.py")
    assert answer.code == 2
    assert "lunch" in answer.err


@pytest.mark.parametrize(("typed", "meant"), [(["laucnh"], "launch"), (["config", "chekc"], "check")])
def test_a_mistyped_command_is_answered_with_the_one_that_is_meant(
    paceline: Paceline, typed: list[str], meant: str
) -> None:
    answer = paceline(*typed)
    assert answer.code == 2
    assert f"No such command {typed[-1]!r}. Did you mean {meant!r}?" in answer.err


def test_no_line_of_a_list_of_commands_is_cut_off() -> None:
    cut = [line for _, text in commands(program, None, "paceline") for line in text.splitlines() if "..." in line]
    assert [line for line in cut if not line.lstrip().startswith(("Usage:", "["))] == []


def test_the_help_of_launch_shows_every_flag_by_topic(paceline: Paceline) -> None:
    answer = paceline("launch", "--help")
    assert answer.code == 0
    shown = {option.flag for option in options() if f"\n  --{option.flag} " in answer.out}
    assert shown == {option.flag for option in options() if option.is_supported}
    topics = [line for line in answer.lines if line.endswith(":") and not line.startswith(" ")]
    assert topics[0] == "What runs where:"
    assert {"FSDP:", "DDP:", "DeepSpeed:", "Mesh:", "torch.compile:", "The command:"} <= set(topics)
    assert topics[-1] == "The command:"


@pytest.mark.parametrize("words", [("verify-resume",), ("parity",), ("test",), ("config", "show")], ids=" ".join)
def test_help_begins_with_what_is_the_commands_own(paceline: Paceline, words: tuple[str, ...]) -> None:
    answer = paceline(*words, "--help")
    topics = [line for line in answer.lines if line.endswith(":") and not line.startswith(" ")]
    assert topics[:2] == ["The command:", "What runs where:"]
    assert "Megatron" not in answer.out.replace("MEGATRON_LM", "")
    assert "TPU" not in answer.out
    assert "Transformer Engine)." not in answer.out


def test_a_flag_that_help_leaves_out_is_still_answered(paceline: Paceline, script: Path) -> None:
    for flags in (("--tpu",), ("--use_megatron_lm",), ("--tpu_name", "a")):
        answer = paceline("launch", *flags, str(script))
        assert answer.code == 2
        assert "is not supported in this release" in answer.err


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
