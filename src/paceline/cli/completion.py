"""`paceline completion`: prints the completion script of a shell."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

_SHELLS = ("bash", "zsh", "fish")
_HELP = """Print the script with which SHELL completes commands, flags and choices.

To install it, append the output to the startup file of the shell:

\b
    paceline completion bash >> ~/.bashrc
    paceline completion zsh >> ~/.zshrc
    paceline completion fish > ~/.config/fish/completions/paceline.fish

A new shell then completes, for example, `paceline launch --fsdp_<Tab>`.
"""


@click.command(name="completion", help=_HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def command(context: click.Context, shell: str) -> None:
    """Print the script; `_HELP` is what users read."""
    kind = get_completion_class(shell)
    assert kind is not None
    root = context.find_root()
    script = kind(root.command, {}, "paceline", "_PACELINE_COMPLETE")
    # `source()` would refuse to print for a shell that is not installed here.
    click.echo(script.source_template % script.source_vars())
