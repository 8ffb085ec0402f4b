"""`paceline config convert`: converts files of Accelerate and DeepSpeed and command lines of torchrun."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from paceline.cli.click_helpers import PathType
from paceline.cli.config.targets import refuse_to_replace
from paceline.cli.schema_flags import complete_files
from paceline.config.conversion import Conversion, convert_file, convert_torchrun, is_torchrun
from paceline.config.sources.writing import replace_file
from paceline.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.errors import Problem

_HELP = """Convert SOURCE to a configuration of paceline, with a line for each key that says what it became.

SOURCE is a file of any version of Accelerate (YAML or JSON, also with FSDP version 1), a DeepSpeed JSON, or a
command line of torchrun. The new file goes to standard output and the lines to standard error; with --output the
file is written there. If keys cannot be converted, all of them are listed, nothing is written (unless --partial is
given) and the exit code is 2.

\b
    paceline config convert accelerate.yaml -o paceline.yaml
    paceline config convert ds_zero3.json
    paceline config convert -o eight.yaml torchrun --nproc_per_node 8 train.py --lr 1e-3
"""


class _ConvertCommand(click.Command):
    """Passes a torchrun command line through: its flags are not flags of this command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        start = next((index for index in range(len(args)) if is_torchrun(args[index:])), None)
        if start is not None and "--" not in args[:start]:
            args = [*args[:start], "--", *args[start:]]
        return super().parse_args(ctx, args)


@click.command(
    name="convert",
    cls=_ConvertCommand,
    help=_HELP,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.argument("source", nargs=-1, required=True, shell_complete=complete_files)
@click.option("-o", "--output", type=PathType(path_type=Path), help="File to write; - is standard output.")
@click.option("--partial", is_flag=True, help="Write the keys that can be converted, even if others cannot.")
@click.option("-f", "--force", is_flag=True, help="Overwrite an existing file; a backup is kept.")
def command(source: tuple[str, ...], output: Path | None, partial: bool, force: bool) -> None:
    """Convert; `_HELP` is what users read."""
    if output == Path("-"):
        output = None
    result = _convert(source)
    for key in result.keys:
        click.echo(str(key), err=output is None)
    folder = Path() if output is None else output.parent
    problems = list(result.problems)
    if not problems or partial:
        problems += result.remaining_problems(_existing(folder)) if result.values else ()
    if problems and not partial:
        raise ConfigError(problems, "nothing was written")
    _write(result, output, force)
    if problems:
        _report(problems)


def _convert(source: Sequence[str]) -> Conversion:
    if is_torchrun(source):
        return convert_torchrun(source)
    if len(source) > 1:
        raise UsageError(
            f"{shlex.join(source)} is neither one file nor a torchrun command line",
            "A command line begins with torchrun, or with python -m torch.distributed.run",
            "Name one file, or give the whole command line",
        )
    return convert_file(Path(source[0]))


def _existing(folder: Path) -> Path:
    """The folder itself or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def _write(result: Conversion, output: Path | None, force: bool) -> None:
    lines: tuple[str, ...] = ()
    if result.command is not None:
        lines = (f"Its command: {_command(result, output)}",)
    if output is None:
        click.echo(result.as_yaml(lines), nl=False)
        return
    if not force:
        refuse_to_replace(output)
    kept = replace_file(output, result.as_yaml(lines))
    click.echo(f"Wrote {output}." + (f" The old file is kept as {kept}." if kept else ""))
    if result.command is not None:
        click.echo(f"Run: {_command(result, output)}")


def _command(result: Conversion, output: Path | None) -> str:
    words = list(result.command or ())
    words[2:2] = ["--config_file", str(output or "FILE")]
    return shlex.join(words)


def _report(problems: Sequence[Problem]) -> None:
    click.echo("paceline: resolve the following by hand:", err=True)
    for problem in problems:
        click.echo(f"  {problem}", err=True)
