"""Where configuration files are written, and what is said about it."""

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


def target_file(env: Mapping[str, str], asked: Path | None) -> Path:
    """Return the file that was asked for, else the one that every launch reads.

    Raises:
        UsageError: It cannot be a file.
    """
    file = default_config_file(env) if asked is None else asked
    if file.is_dir():
        raise UsageError(f"{str(file)!r} is a folder", "A configuration is one file", "Name the file in it")
    return file


def refuse_to_replace(file: Path) -> None:
    """Raise `UsageError` when there is such a file already."""
    if file.exists():
        raise UsageError(
            f"There is already a {file}",
            "It may hold settings that somebody wants",
            "Give --force to replace it (the old one is kept beside it), or --config_file to write elsewhere",
        )


def write_file(file: Path, text: str, *, is_default: bool) -> None:
    """Write a configuration and say how it is used.

    Raises:
        UsageError: The file cannot be written.
    """
    try:
        kept = replace_file(file, text)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"{str(file)!r} cannot be written", reason, "Name another --config_file") from error
    if kept is not None:
        click.echo(f"The file that was there is kept as {kept}.")
    flag = "" if is_default else f"--config_file {file} "
    click.echo(f"Wrote {file}. It is read by: paceline launch {flag}script.py")
    click.echo(f"Try it out: paceline test {flag}".rstrip())
    other = os.environ.get("PACELINE_CONFIG_FILE")
    if is_default and other:
        click.echo(f"paceline: PACELINE_CONFIG_FILE is set, so that {other} is read in its place", err=True)
