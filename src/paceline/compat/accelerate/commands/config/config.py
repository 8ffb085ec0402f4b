"""`accelerate config`: asks questions and writes the file."""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import Any

from paceline.compat.accelerate.commands.utils import command_parser, run_command
from paceline.compat.accelerate.settings.errors import unsupported

__all__ = ["config_command", "config_command_parser", "get_user_input", "main"]

_FILE = "File to write. Default: default_config.yaml in the folder where a launch looks for it."


def config_command_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """Return the parser.

    Args:
        subparsers: Where to add it as the command `config`, if it is one of several.
    """
    text = "Ask a few questions and write the configuration file, as `paceline config` does."
    parser = command_parser("config", subparsers, argparse.ArgumentParser, description=text)
    parser.add_argument("--config_file", help=_FILE)
    parser.set_defaults(func=config_command)
    return parser


def config_command(args: argparse.Namespace) -> None:
    """Ask, and write the file.

    Args:
        args: What the parser returned.

    Raises:
        SystemExit: The questions were left without an answer.
    """
    file = [] if args.config_file is None else ["--config_file", str(args.config_file)]
    code = subprocess.call([sys.executable, "-m", "paceline", "config", *file])
    if code:
        raise SystemExit(code)


@unsupported("The questions are those of `paceline config`, which writes a file", "Call config_command(args)")
def get_user_input() -> Any:
    """Ask, and return the configuration: not supported."""


def main() -> None:
    """Run `accelerate config`."""
    run_command(config_command, config_command_parser().parse_args())


if __name__ == "__main__":
    main()
