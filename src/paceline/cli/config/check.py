"""`paceline config check`: reports all problems of configuration files."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from paceline.cli.click_helpers import PathType
from paceline.config import find_config_file, resolve
from paceline.config.conversion import deepspeed_problems
from paceline.errors import ConfigError, PrepareError, Problem, UsageError, counted

if TYPE_CHECKING:
    from paceline.config import Resolved

_HELP = """Check configuration files (and DeepSpeed JSON files) without starting anything.

All problems of all files are reported, with their lines. The exit code is 0 if `paceline launch` would accept every
file, else 2. Environment variables are ignored. Without FILE, the file that `paceline launch` would read is checked.

With --model the settings that name parts of a model, such as fsdp_transformer_layer_cls_to_wrap, are checked against
the model, which is built on the meta device, without memory for its weights.

\b
    paceline config check
    paceline config check fsdp.yaml ds_config.json
    paceline config check fsdp.yaml --model my_package.models:build_model
    paceline config check fsdp.yaml --model ./checkpoints/llama   (a folder with transformers' config.json)
"""

_BLOCK_CLASSES = "fsdp_config.fsdp_transformer_layer_cls_to_wrap"


@dataclass(frozen=True, slots=True)
class _Verdict:
    file: str
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()
    summary: str = ""


@click.command(name="check", help=_HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("files", metavar="[FILE]...", nargs=-1, type=PathType(path_type=Path))
@click.option("--model", metavar="MODEL", help="module:function that returns the model, or a transformers folder.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of lines.")
def command(files: tuple[Path, ...], model: str | None, as_json: bool) -> None:
    """Check the files; `_HELP` is what users read."""
    verdicts = [_check(file, model) for file in files or _default_file()]
    if as_json:
        click.echo(json.dumps([asdict(verdict) for verdict in verdicts], indent=2))
    else:
        for verdict in verdicts:
            _print(verdict)
    if any(verdict.problems for verdict in verdicts):
        sys.exit(ConfigError.exit_code)


def _default_file() -> tuple[Path]:
    found = find_config_file(os.environ)
    if found is None:
        raise UsageError("There is no configuration file to check", "None of the default files exists", "Name one")
    return (found,)


def _check(file: Path, model: str | None) -> _Verdict:
    of_deepspeed = deepspeed_problems(file)
    if of_deepspeed is not None:
        return _Verdict(str(file), tuple(of_deepspeed), summary="a DeepSpeed configuration")
    try:
        resolved = resolve(flags={}, env={}, file=file, starts_ranks=True)
    except ConfigError as error:
        return _Verdict(str(file), tuple(sorted(error.problems, key=_line)))
    config = resolved.config
    summary = f"strategy {config.strategy}, mixed_precision {config.mixed_precision}"
    if model is None or config.strategy != "fsdp":
        return _Verdict(str(file), (), resolved.notes, summary)
    problems, blocks = _check_blocks(resolved, model)
    return _Verdict(str(file), tuple(problems), resolved.notes, f"{summary}; {blocks}")


def _check_blocks(resolved: Resolved, name: str) -> tuple[list[Problem], str]:
    """Find the blocks into which FSDP would cut a model.

    Args:
        resolved: The configuration.
        name: `module:function`, or the folder or file of a transformers configuration.

    Returns:
        What is wrong, and the blocks in words.

    Raises:
        UsageError: There is no such model, or it cannot be built.
    """
    from paceline.cli.model_source import build_model
    from paceline.config import FullyShardedDataParallelPlugin
    from paceline.strategies.blocks import find_units

    plugin = resolved.config.fsdp_config or FullyShardedDataParallelPlugin()
    try:
        return [], str(find_units(build_model(name, "--model"), plugin))
    except PrepareError as error:
        where = resolved.origin(_BLOCK_CLASSES).where
        return [Problem(where, _BLOCK_CLASSES, error.saw, error.why, error.todo)], ""


def _line(problem: Problem) -> int:
    """The line of a problem with a file; 0 for one with the whole file."""
    number = problem.where.rpartition(":")[2]
    return int(number) if number.isdigit() else 0


def _print(verdict: _Verdict) -> None:
    count = len(verdict.problems)
    if not count:
        click.echo(f"{verdict.file}: fine ({verdict.summary})")
    else:
        click.echo(f"{verdict.file}: {counted(count, 'problem')}")
    for problem in verdict.problems:
        click.echo(f"  {problem}")
    for note in verdict.notes:
        click.echo(f"  {note}")
