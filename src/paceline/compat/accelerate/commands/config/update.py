"""`accelerate config update`: writes a file again, with today's keys."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from paceline.compat.accelerate.commands.config.config_args import default_config_file, load_config_from_file
from paceline.compat.accelerate.settings.errors import InvalidValueError

__all__ = ["update_command_parser", "update_config", "update_config_command"]


def update_config(args: argparse.Namespace) -> str:
    """Read the file and write it again.

    Args:
        args: Has `config_file`; None stands for the default one.

    Returns:
        The file.

    Raises:
        InvalidValueError: There is no such file.
    """
    file = default_config_file if args.config_file is None else str(args.config_file)
    if not Path(file).exists():
        raise InvalidValueError(f"There is no file {file!r}", "It was to be updated", "Check the path")
    config = load_config_from_file(file)
    if file.endswith(".json"):
        config.to_json_file(file)
    else:
        config.to_yaml_file(file)
    return file


def update_command_parser(parser: Any, parents: list[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add the command `update`.

    Args:
        parser: The subcommands of `config`.
        parents: Parsers whose arguments it takes over.
    """
    text = "Write an old file again with today's keys; its values stay."
    added: argparse.ArgumentParser = parser.add_parser("update", parents=parents, help=text, description=text)
    added.add_argument("--config_file", help=f"File to update [{default_config_file}].")
    added.set_defaults(func=update_config_command)
    return added


def update_config_command(args: argparse.Namespace) -> None:
    """Update the file.

    Args:
        args: What the parser returned.
    """
    print(f"Updated {update_config(args)}")
