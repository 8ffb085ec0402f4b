"""The `paceline` command; each subcommand is imported when it is called."""

from __future__ import annotations

import sys

import click

from paceline import __version__
from paceline.cli.click_helpers import LazyGroup
from paceline.cli.interrupts import INTERRUPTED
from paceline.errors import PacelineError, WorkerError

__all__ = ["command", "main", "program"]

_COMMANDS = {
    "launch": ("paceline.cli.launch", "Run a training script on all devices, of one machine or many."),
    "config": ("paceline.cli.config", "Write, check, explain and convert the configuration."),
    "checkpoint": ("paceline.cli.checkpoint", "List, inspect, verify, export and convert checkpoints."),
    "merge-weights": ("paceline.cli.merge_weights", "Merge a sharded checkpoint into safetensors weights."),
    "verify-resume": (
        "paceline.cli.script_checks.verify_resume",
        "Check that a killed script resumes exactly.",
    ),
    "test": ("paceline.cli.test", "Check this installation with a small training on all devices."),
    "parity": (
        "paceline.cli.script_checks.parity",
        "Check that a script trains the same on several processes as on one.",
    ),
    "estimate": ("paceline.cli.estimate", "Show what a model takes in memory, by strategy and number of ranks."),
    "report": ("paceline.cli.report", "Write one HTML page about a run: curves, settings, environment."),
    "env": ("paceline.cli.env", "Show versions, devices and the configuration file."),
    "completion": ("paceline.cli.completion", "Print the shell completion script."),
}

_TOPICS = {
    "Start": ("estimate", "launch", "config"),
    "Check": ("env", "test", "parity", "verify-resume"),
    "Inspect": ("report", "checkpoint", "merge-weights"),
}

_HELP = "One PyTorch training script on one CPU, one GPU or many nodes, under DDP, FSDP2 or DeepSpeed."

_EXAMPLES = (
    ("paceline test", "does everything work here?"),
    ("paceline launch train.py --lr 1e-3", "train on all devices"),
    ("paceline launch --use_fsdp train.py", "the same, sharded"),
    ("paceline launch --dry_run train.py", "show what would be started"),
    ("paceline estimate config.json", "does the model fit, and how must it be sharded?"),
    ("paceline config", "answer a few questions once, launch without flags"),
    ("paceline config show --explain", "every setting and its source"),
    ("paceline parity train.py", "does it train the same on several as on one?"),
    ("paceline checkpoint list runs/a", "what was saved, and whether it is complete"),
    ("paceline report runs/a", "curves and settings on one page"),
)


@click.group(
    cls=LazyGroup,
    lazy=_COMMANDS,
    topics=_TOPICS,
    examples=_EXAMPLES,
    help=_HELP,
    epilog="`paceline COMMAND --help` explains a command, with examples.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="paceline")
def command() -> None:
    """Run the command line."""


def program() -> None:
    """Run `main` as the `paceline` program and end the process.

    With torch imported, shutting the interpreter down takes a tenth of the import's time, for which users would wait
    after the last line; and a thread that hangs in torch's store on a dead connection would crash the shutdown.
    """
    try:
        main()
    except SystemExit as stop:
        if "torch" not in sys.modules or not isinstance(stop.code, int):
            raise
        from paceline.launch.worker import exit_now

        exit_now(stop.code)


def main() -> None:
    """Run the command line; exit with 0, or with the code of the error."""
    try:
        # A command that succeeds returns None.
        sys.exit(command.main(prog_name="paceline", standalone_mode=False) or 0)
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
