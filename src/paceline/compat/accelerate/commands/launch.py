"""Launching a script from a program: an argparse parser with the flags of `paceline launch`, and what runs it."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from paceline.config import options

__all__ = ["launch_command", "launch_command_parser"]

_TRUTH = frozenset({"true", "false", "yes", "no", "on", "off", "1", "0"})
# Flags of the command itself, which no configuration file has.
_SWITCHES = ("module", "no_python", "dry_run", "quiet")


class LaunchParser(argparse.ArgumentParser):
    """A parser whose flags may be written with - or _, and whose true-or-false flags need no value."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse a command line."""
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args(list(self._completed(given)), namespace)

    def _completed(self, args: Sequence[str]) -> Iterator[str]:
        """Write each flag with _, and a true-or-false flag with its value; leave the script's arguments alone."""
        rest = list(args)
        while rest and rest[0].startswith("-"):
            token = rest.pop(0)
            name, equals, value = token.partition("=")
            name = f"--{name[2:].replace('-', '_')}" if name.startswith("--") else name
            yield f"{name}{equals}{value}"
            action = self._option_string_actions.get(name)
            if action is None or action.nargs == 0 or equals:
                continue
            is_bare = action.metavar == "BOOL" and not (rest and rest[0].lower() in _TRUTH)
            if is_bare:
                yield "true"
            elif rest:
                yield rest.pop(0)
        yield from rest


def launch_command_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """Return a parser of the flags of `paceline launch`, followed by a script and its arguments.

    Args:
        subparsers: Where to add it as the command `launch`, if it is one of several.
    """
    texts: dict[str, Any] = {
        "description": "Run a script on all devices. `paceline launch --help` describes the flags.",
        "usage": "paceline launch [flags] script [arguments]",
    }
    parser: argparse.ArgumentParser
    if subparsers is None:
        parser = LaunchParser("paceline launch", allow_abbrev=False, **texts)
    else:
        parser = subparsers.add_parser("launch", allow_abbrev=False, **texts)
    parser.add_argument("--config_file", help="YAML or JSON file to read.")
    parser.add_argument("-m", "--module", action="store_true", help="The script is a module.")
    for name in _SWITCHES[1:]:
        parser.add_argument(f"--{name}", action="store_true")
    known = set(parser._option_string_actions)
    for option in options():
        if f"--{option.flag}" not in known:
            metavar = "BOOL" if option.kind == "bool" else option.kind.upper()
            help_text = option.description.replace("%", "%%")
            parser.add_argument(f"--{option.flag}", dest=option.flag, metavar=metavar, help=help_text)
    parser.add_argument("training_script")
    parser.add_argument("training_script_args", nargs=argparse.REMAINDER)
    if subparsers is not None:
        parser.set_defaults(func=launch_command)
    return parser


def launch_command(args: argparse.Namespace) -> None:
    """Run a script as `paceline launch` does, with paceline in the place of Accelerate.

    Args:
        args: What the parser returned.

    Raises:
        SystemExit: The command failed; it has reported why.
    """
    values = {name: value for name, value in vars(args).items() if value not in (None, False)}
    script = [values.pop("training_script"), *values.pop("training_script_args", [])]
    values.pop("func", None)
    # The command replaces its own process by the script's in places, and reports failures at its end.
    command = [sys.executable, "-m", "paceline", "launch", "--as_accelerate", "true"]
    for name, value in values.items():
        command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    code = subprocess.call([*command, *script])
    if code:
        raise SystemExit(code)
