"""The argument parser of the commands: flags may be written with - or _, and it knows which were given."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from paceline.errors import PacelineError

__all__ = ["CustomArgumentParser", "command_parser", "run_command"]

_TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


class CustomArgumentParser(argparse.ArgumentParser):
    """A parser whose flags may be written with - or _.

    A result has the names of the flags that were given in `nondefault`. What follows a script or a subcommand belongs
    to that, and is left as it is.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse a command line; see `argparse.ArgumentParser`."""
        line = list(sys.argv[1:] if args is None else args)
        given: set[str] = set()
        found, rest = super().parse_known_args(list(self._spelled(line, given)), namespace)
        found.nondefault = given | getattr(found, "nondefault", set())
        return found, rest

    def _spelled(self, line: Sequence[str], given: set[str]) -> Iterator[str]:
        """Write each flag as it was declared, and note its name in `given`."""
        rest = list(line)
        while rest:
            token = rest.pop(0)
            name, equals, value = token.partition("=")
            flag = f"--{name[2:].replace('-', '_')}" if name.startswith("--") else name
            action = self._option_string_actions.get(flag)
            if action is None:
                yield token
                if not token.startswith("-") and self._has_tail():
                    break
                continue
            given.add(action.dest)
            if action.nargs == 0:
                yield from _switch(flag, [value] if equals else rest)
            else:
                yield f"{flag}{equals}{value}"
                yield from _values(action, bool(equals), rest)
        yield from rest

    def _has_tail(self) -> bool:
        """Whether everything after the first positional argument belongs to something else."""
        return any(action.nargs in (argparse.REMAINDER, argparse.PARSER) for action in self._actions)


def command_parser(
    name: str, subparsers: Any, kind: type[argparse.ArgumentParser] = CustomArgumentParser, **settings: Any
) -> argparse.ArgumentParser:
    """Return the parser of `accelerate NAME`.

    Args:
        name: The command.
        subparsers: Where to add it, if it is one of several commands; else None.
        kind: The class of a parser of its own.
        **settings: Arguments of the parser.
    """
    if subparsers is None:
        return kind(f"accelerate {name}", **settings)
    added: argparse.ArgumentParser = subparsers.add_parser(name, **settings)
    return added


def _switch(flag: str, rest: list[str]) -> Iterator[str]:
    """Write a switch, also where a word for true or false follows it."""
    is_on = True
    if rest and rest[0].lower() in _TRUTH:
        is_on = _TRUTH[rest.pop(0).lower()]
    if is_on:
        yield flag


def _values(action: argparse.Action, has_value: bool, rest: list[str]) -> Iterator[str]:
    """Take the values of a flag, so that they are not mistaken for a script."""
    if has_value or not rest:
        return
    if action.nargs is None:
        yield rest.pop(0)
    while action.nargs == argparse.ONE_OR_MORE and rest and not rest[0].startswith("-"):
        yield rest.pop(0)


def run_command(command: Callable[[Any], object], args: Any) -> None:
    """Run a command as a program: what is wrong with its arguments or files is printed, without a traceback.

    Args:
        command: The command.
        args: Its arguments, parsed.
    """
    try:
        command(args)
    except (PacelineError, OSError) as error:
        print(f"paceline: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))
