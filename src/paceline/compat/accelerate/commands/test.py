"""`accelerate test`: a small training on all devices, as `paceline test` runs it."""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import Any

from paceline.compat.accelerate.commands.utils import command_parser, run_command

__all__ = ["main", "test_command", "test_command_parser"]


def test_command_parser(subparsers: Any = None) -> argparse.ArgumentParser:  # noqa: PT028 - no test
    """Return the parser.

    Args:
        subparsers: Where to add it as the command `test`, if it is one of several.
    """
    parser = command_parser("test", subparsers, argparse.ArgumentParser)
    parser.add_argument("--config_file", help="Configuration file to test.")
    parser.set_defaults(func=test_command)
    return parser


def test_command(args: argparse.Namespace) -> None:
    """Run the checks.

    Args:
        args: What the parser returned.

    Raises:
        SystemExit: A check failed; the command has reported which.
    """
    file = [] if args.config_file is None else ["--config_file", str(args.config_file)]
    code = subprocess.call([sys.executable, "-m", "paceline", "test", *file])
    if code:
        raise SystemExit(code)


def main() -> None:
    """Run `accelerate test`."""
    run_command(test_command, test_command_parser().parse_args())


if __name__ == "__main__":
    main()
