"""`paceline config`: the questionnaire, and the commands for configuration files."""

from __future__ import annotations

from pathlib import Path

import click

from paceline.cli.click_helpers import LazyGroup, PathType

_COMMANDS = {
    "default": ("paceline.cli.config.default", "Write a file of defaults, without questions."),
    "update": ("paceline.cli.config.update", "Update an old file in place."),
    "show": ("paceline.cli.config.show", "Show every value and where it comes from."),
    "check": ("paceline.cli.config.check", "Report all problems of files."),
    "convert": (
        "paceline.cli.config.convert",
        "Convert a file of Accelerate or DeepSpeed, or a torchrun command line.",
    ),
    "schema": ("paceline.cli.config.schema", "Print the JSON Schema of the file, for editors."),
}

_HELP = """Write, check, explain and convert the configuration.

Without a subcommand it asks a few questions and writes default_config.yaml, which every `paceline launch` then
reads. Arrow keys select, Enter confirms, Esc goes back, and Ctrl-C quits without writing. Answers can also come from a
pipe, one per line: an empty line takes the default, and < goes back.

\b
    paceline config
    paceline config --config_file fsdp.yaml
    paceline config show --explain --mixed_precision bf16
    paceline config check *.yaml
    paceline config convert ~/.cache/huggingface/accelerate/default_config.yaml -o new.yaml
    paceline config convert torchrun --nproc_per_node 8 train.py --lr 1e-3
"""


@click.group(
    name="config",
    cls=LazyGroup,
    lazy=_COMMANDS,
    help=_HELP,
    invoke_without_command=True,
    epilog="`paceline config COMMAND --help` explains a command.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.option(
    "--config_file",
    "--config-file",
    type=PathType(path_type=Path, dir_okay=False),
    help="File to write; default: default_config.yaml in PACELINE_HOME or the user's cache.",
)
@click.pass_context
def command(context: click.Context, config_file: Path | None) -> None:
    """Ask, when no subcommand is called."""
    if context.invoked_subcommand is None:
        from paceline.cli.config.interview import ask_and_write

        ask_and_write(config_file)
    elif config_file is not None:
        name = context.invoked_subcommand
        raise click.UsageError(f"--config_file before {name} is not used: write `paceline config {name} …` first.")
