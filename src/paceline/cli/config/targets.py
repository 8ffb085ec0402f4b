"""Where the commands write configuration files."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from paceline.config import default_config_file
from paceline.config.sources.writing import replace_file
from paceline.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["refuse_to_replace", "target_file", "write_file"]


def target_file(env: Mapping[str, str], explicit: Path | None) -> Path:
    """Return the explicit file, else the default file that every launch reads.

    Raises:
        UsageError: The path is a folder.
    """
    file = default_config_file(env) if explicit is None else explicit
    if file.is_dir():
        raise UsageError(f"{str(file)!r} is a folder", "A configuration is one file", "Name the file in it")
    return file


def refuse_to_replace(file: Path) -> None:
    """Raise `UsageError` when the file exists."""
    if file.exists():
        raise UsageError(
            f"{file} exists",
            "Its settings would be lost",
            "Pass --force to overwrite it (a backup is kept), or --config_file to write another file",
        )


def write_file(file: Path, text: str, *, is_default: bool) -> None:
    """Write a configuration and print how to use it.

    Raises:
        UsageError: The file cannot be written.
    """
    try:
        kept = replace_file(file, text)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"{str(file)!r} cannot be written", reason, "Name another --config_file") from error
    if kept is not None:
        click.echo(f"The old file is kept as {kept}.")
    flag = "" if is_default else f"--config_file {file} "
    click.echo(f"Wrote {file}. It is read by: paceline launch {flag}script.py")
    click.echo(f"Try it out: paceline test {flag}".rstrip())
    other = os.environ.get("PACELINE_CONFIG_FILE")
    if is_default and other:
        click.echo(f"paceline: PACELINE_CONFIG_FILE is set, so {other} is read instead", err=True)
