"""`paceline config schema`."""

from __future__ import annotations

import json

import click

from paceline.config.json_schema import json_schema

_HELP = """Print the JSON Schema of the configuration file, from which editors complete, explain and check.

Editors with the YAML language server (VS Code, Neovim, Helix, Emacs) use it for files that begin with:

\b
    # yaml-language-server: $schema=paceline.schema.json

after

\b
    paceline config schema > paceline.schema.json
"""


@click.command(name="schema", help=_HELP, context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Print it; `_HELP` is what users read."""
    click.echo(json.dumps(json_schema(), indent=2))
