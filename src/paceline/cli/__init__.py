"""The `paceline` command; each subcommand is imported when it is called."""

from __future__ import annotations

import sys

import click

from paceline import __version__
from paceline.cli.interrupts import INTERRUPTED
from paceline.cli.lazy import LazyGroup
from paceline.errors import PacelineError, WorkerError

__all__ = ["main", "program"]

_COMMANDS = {
    "launch": ("paceline.cli.launch", "Run a training script on all devices, of one machine or many."),
    "config": ("paceline.cli.config", "Write, check, explain and convert the configuration."),
    "checkpoint": ("paceline.cli.checkpoint", "List, inspect, verify, export and convert checkpoints."),
    "merge-weights": ("paceline.cli.merge_weights", "Merge a sharded checkpoint into safetensors weights."),
    "verify-resume": (
        "paceline.cli.verify_resume",
        "Check that a script that is killed resumes exactly.",
    ),
    "test": ("paceline.cli.test", "Try this installation out, on all devices."),
    "parity": ("paceline.cli.parity", "Check that a script trains on several processes as on one."),
    "report": ("paceline.cli.report", "Write one HTML page about a run: curves, settings, environment."),
    "env": ("paceline.cli.env", "Show versions, devices and the configuration in force."),
    "completion": ("paceline.cli.completion", "Let a shell complete commands and flags."),
}

_TOPICS = {
    "Start": ("launch", "config"),
    "Check": ("env", "test", "parity", "verify-resume"),
    "Look back": ("report", "checkpoint", "merge-weights"),
}

_HELP = "One PyTorch training script on one CPU, one GPU or many nodes, under DDP, FSDP2 or DeepSpeed."

_EXAMPLES = (
    ("paceline test", "does everything work here?"),
    ("paceline launch train.py --lr 1e-3", "train on all devices"),
    ("paceline launch --use_fsdp train.py", "the same, sharded"),
    ("paceline launch --dry_run train.py", "show what would be started"),
    ("paceline config", "answer once, launch without flags"),
    ("paceline config show --explain", "every setting, and who set it"),
    ("paceline parity train.py", "trains the same on several as on one?"),
    ("paceline checkpoint list runs/a", "what was saved, what is whole"),
    ("paceline report runs/a", "curves and settings on one page"),
)


@click.group(
    cls=LazyGroup,
    lazy=_COMMANDS,
    topics=_TOPICS,
    examples=_EXAMPLES,
    help=_HELP,
    epilog="`paceline COMMAND --help` says more, with examples.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="paceline")
def _paceline() -> None:
    """Run the command line."""


def program() -> None:
    """Be the `paceline` program: `main`, after which the process ends.

    With torch imported, taking the interpreter apart takes a tenth of the import's time, which everybody would wait
    for after the last line; and a thread that a dead line holds in torch's store would take the process down with it.
    """
    try:
        main()
    except SystemExit as stop:
        if "torch" not in sys.modules or not isinstance(stop.code, int):
            raise
        from paceline.launch.worker import exit_now

        exit_now(stop.code)


def main() -> None:
    """Run the command line and exit with the code that belongs to what happened."""
    try:
        # Nothing is returned by a command that ended well.
        sys.exit(_paceline.main(prog_name="paceline", standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.stderr.write("stopped by SIGINT\n")
        sys.exit(INTERRUPTED)
    except WorkerError as error:
        sys.stderr.write(str(error).rstrip("\n") + "\n")
        sys.exit(error.code)
    except PacelineError as error:
        sys.stderr.write(f"paceline: {str(error).rstrip()}\n")
        sys.exit(error.exit_code)
