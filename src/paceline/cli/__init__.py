"""The `paceline` command; each subcommand is imported when it is called."""

from __future__ import annotations

import sys
from importlib import import_module

import click

from paceline import __version__
from paceline.errors import PacelineError, WorkerError

__all__ = ["main"]

_COMMANDS = {
    "launch": ("paceline.cli.launch", "Run a training script on all devices of this machine."),
    "env": ("paceline.cli.env", "Show versions, devices and the configuration in force."),
}

_HELP = """One PyTorch training script on one CPU, one GPU or many, under DDP or FSDP2.

\b
    paceline launch train.py --lr 1e-3
    paceline launch --use_fsdp --mixed_precision bf16 train.py
    paceline launch --dry-run train.py
    paceline env
"""


class _LazyGroup(click.Group):
    """Lists its commands without importing them: `paceline --help` needs no torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = import_module(_COMMANDS[cmd_name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.group(
    cls=_LazyGroup,
    help=_HELP,
    epilog="`paceline COMMAND --help` says more.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="paceline")
def _paceline() -> None:
    """Run the command line."""


def main() -> None:
    """Run the command line and exit with the code that belongs to what happened."""
    try:
        _paceline(prog_name="paceline")
    except WorkerError as error:
        sys.stderr.write(str(error).rstrip("\n") + "\n")
        sys.exit(error.code)
    except PacelineError as error:
        sys.stderr.write(f"paceline: {str(error).rstrip()}\n")
        sys.exit(error.exit_code)
