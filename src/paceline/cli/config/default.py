"""`paceline config default`: writes a file of defaults."""

from __future__ import annotations

import os
from pathlib import Path

import click

from paceline.cli.click_helpers import PathType
from paceline.cli.config.targets import refuse_to_replace, target_file, write_file
from paceline.config.schema.names import all_settings
from paceline.config.sources.writing import as_yaml, yaml_value

_SUGGESTED = (
    "strategy",
    "num_processes",
    "num_machines",
    "gradient_accumulation_steps",
    "use_cpu",
    "dynamo_config.dynamo_backend",
)
_HELP = """Write default_config.yaml without questions.

The file does not depend on this machine: the number of processes and the strategy are chosen at each launch.

\b
    paceline config default
    paceline config default --mixed_precision bf16
"""


def _more() -> list[str]:
    """Return the settings that users change most, as comments."""
    lines = []
    for dotted in _SUGGESTED:
        section, _, key = dotted.rpartition(".")
        value = yaml_value(all_settings()[dotted].default)
        shown = f"{section}: {{{key}: {value}}}" if section else f"{key}: {value}"
        lines += ["", f"# {all_settings()[dotted].description}", f"# {shown}"]
    return lines


@click.command(name="default", help=_HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--mixed_precision",
    "--mixed-precision",
    type=click.Choice([str(choice) for choice in all_settings()["mixed_precision"].shape.choices]),
    default=str(all_settings()["mixed_precision"].default),
    help=all_settings()["mixed_precision"].description,
)
@click.option(
    "--config_file", "--config-file", type=PathType(path_type=Path), help="File to write instead of the default one."
)
@click.option("-f", "--force", is_flag=True, help="Overwrite an existing file; a backup is kept.")
def command(mixed_precision: str, config_file: Path | None, force: bool) -> None:
    """Write the file; `_HELP` is what users read."""
    file = target_file(os.environ, config_file)
    if not force:
        refuse_to_replace(file)
    header = (
        "Written by `paceline config default`. Settings in comments are shown with their defaults.",
        "`paceline config` asks questions instead; `paceline config show --explain` lists every setting.",
    )
    text = as_yaml({"mixed_precision": mixed_precision}, header) + "\n".join([*_more(), ""])
    write_file(file, text, is_default=config_file is None)
