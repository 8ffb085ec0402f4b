"""`paceline config update`: rewrites an old file with current keys, in place."""

from __future__ import annotations

import os
from pathlib import Path

import click

from paceline.cli.click_helpers import PathType
from paceline.config import find_config_file
from paceline.config.conversion import convert_file, deepspeed_problems
from paceline.config.sources.writing import replace_file
from paceline.errors import ConfigError, UsageError

_HELP = """Rewrite FILE with current keys: renamed keys, FSDP version 1, settings of very old versions.

A line for each key says what it became. The old file is kept as FILE.bak. A file that is up to date, or that has a
key without a counterpart, is not changed. Without FILE, the file that `paceline launch` would read is updated.

\b
    paceline config update --dry_run
    paceline config update old.yaml
"""


@click.command(name="update", help=_HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("file", type=PathType(path_type=Path), required=False)
@click.option("--config_file", "--config-file", type=PathType(path_type=Path), help="The same as FILE.")
@click.option("--dry_run", "--dry-run", is_flag=True, help="Print what would change; write nothing.")
def command(file: Path | None, config_file: Path | None, dry_run: bool) -> None:
    """Update the file; `_HELP` is what users read."""
    if file is not None and config_file is not None:
        raise click.UsageError("FILE and --config_file are the same: give one of the two.")
    found = find_config_file(os.environ, file or config_file)
    if found is None:
        raise UsageError("There is no configuration file", "None of the default files exists", "Name the file")
    if deepspeed_problems(found) is not None:
        raise UsageError(
            f"{found} is DeepSpeed's own JSON",
            "It has no old keys to update",
            "Use it as it is, or convert it: paceline config convert",
        )
    result = convert_file(found, compact=False)
    if result.problems:
        raise ConfigError(result.problems, "nothing was written")
    if not result.is_changed:
        click.echo(f"{found} is up to date.")
        return
    for key in result.keys:
        click.echo(str(key))
    problems = result.remaining_problems(found.absolute().parent)
    if problems:
        raise ConfigError(problems, "nothing was written")
    if dry_run:
        return
    kept = replace_file(found, result.as_yaml())
    click.echo(f"Updated {found}; the old file is kept as {kept}.")
