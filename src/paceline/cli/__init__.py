"""The `paceline` command; each subcommand is imported when it is called."""

from __future__ import annotations

import sys

import click

from paceline import __version__
from paceline.cli.lazy import LazyGroup
from paceline.errors import PacelineError, WorkerError

__all__ = ["main"]

_COMMANDS = {
    "launch": ("paceline.cli.launch", "Run a training script on all devices of this machine."),
    "config": ("paceline.cli.config", "Write, check, explain and convert the configuration."),
    "checkpoint": ("paceline.cli.checkpoint", "List, inspect, verify, export and convert checkpoints."),
    "merge-weights": ("paceline.cli.merge_weights", "Merge a sharded checkpoint into safetensors weights."),
    "verify-resume": (
        "paceline.cli.verify_resume",
        "Kill a script, resume it, and compare it with a run never killed.",
    ),
    "test": ("paceline.cli.test", "Try this installation out: a small training with known answers."),
    "parity": ("paceline.cli.parity", "Compare a script on several processes with the same script on one."),
    "report": ("paceline.cli.report", "Write one HTML page about a run: curves, settings, environment."),
    "env": ("paceline.cli.env", "Show versions, devices and the configuration in force."),
    "completion": ("paceline.cli.completion", "Print the script that lets a shell complete commands and flags."),
}

_HELP = """One PyTorch training script on one CPU, one GPU or many, under DDP or FSDP2.

\b
    paceline launch train.py --lr 1e-3
    paceline launch --use_fsdp --mixed_precision bf16 train.py
    paceline launch --dry-run train.py
    paceline config
    paceline config show --explain
    paceline checkpoint list runs/a
    paceline env
"""


@click.group(
    cls=LazyGroup,
    lazy=_COMMANDS,
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
