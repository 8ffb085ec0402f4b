"""`accelerate config`: writes the configuration file, and reads it."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from paceline.compat.accelerate.commands.config.config import config_command_parser
from paceline.compat.accelerate.commands.config.config_args import default_config_file, load_config_from_file
from paceline.compat.accelerate.commands.config.default import default_command_parser
from paceline.compat.accelerate.commands.config.update import update_command_parser
from paceline.compat.accelerate.commands.utils import run_command

__all__ = [
    "config_command_parser",
    "default_command_parser",
    "default_config_file",
    "get_config_parser",
    "load_config_from_file",
    "main",
    "update_command_parser",
]


def get_config_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """Return the parser of `accelerate config` with its commands `default` and `update`.

    Args:
        subparsers: Where to add it as the command `config`, if it is one of several.
    """
    parser = config_command_parser(subparsers)
    parent = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    commands = parser.add_subparsers(title="subcommands", dest="subcommand")
    default_command_parser(commands, [parent])
    update_command_parser(commands, [parent])
    return parser


def main() -> None:
    """Run `accelerate config`."""
    args = get_config_parser().parse_args(sys.argv[1:])
    run_command(args.func, args)


if __name__ == "__main__":
    main()
