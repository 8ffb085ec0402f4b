"""What commands are built of: a group that imports only the called command, paths, examples under the help."""

from __future__ import annotations

import os
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click
from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Mapping

    from click import Context, Parameter

__all__ = ["DTYPES", "HELP_FLAGS", "LazyGroup", "PathType", "examples"]

HELP_FLAGS = {"help_option_names": ["-h", "--help"]}
"""Context settings of every command: both flags show the help."""


DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Torch's names of the dtypes that options name; no torch is imported for them."""


class PathType(click.Path):
    """A path in which `~` is the home folder, also where the shell has not expanded it (`--log_dir=~/logs`)."""

    @override
    def convert(self, value: Any, param: Parameter | None, ctx: Context | None) -> Any:
        return super().convert(os.path.expanduser(value), param, ctx)  # noqa: PTH111 - as a shell does


def examples(*lines: str) -> str:
    """Return an epilog with command lines, which click leaves unwrapped."""
    return "\b\n" + "\n".join(("Examples:", *(f"    {line}" for line in lines)))


class LazyGroup(click.Group):
    """A group that lists its commands without importing them: `paceline --help` needs no torch.

    Args:
        lazy: Name of each command to its module, which holds it as `command`, and to the line in the list.
        topics: Headings of the list, each with the commands under it; the others come last.
        examples: Command lines with what each does; shown at the end.
        settings: The arguments of `click.Group`.
    """

    def __init__(
        self,
        lazy: Mapping[str, tuple[str, str]],
        topics: Mapping[str, tuple[str, ...]] | None = None,
        examples: tuple[tuple[str, str], ...] = (),
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self._lazy = lazy
        self._topics = dict(topics or {})
        grouped = {name for names in self._topics.values() for name in names}
        self._topics["More" if grouped else "Commands"] = tuple(name for name in lazy if name not in grouped)
        self._examples = examples

    def list_commands(self, ctx: Context) -> list[str]:
        """Return the names of the commands, in the order of the list."""
        return list(self._lazy)

    def get_command(self, ctx: Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in self._lazy:
            return None
        command: click.Command = import_module(self._lazy[cmd_name][0]).command
        return command

    def resolve_command(self, ctx: Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; click itself would look for a mistyped one only among those that are imported."""
        close = get_close_matches(args[0], self._lazy, n=1)
        if close and args[0] not in self._lazy and not ctx.resilient_parsing:
            raise click.UsageError(f"No such command {args[0]!r}. Did you mean {close[0]!r}?", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Context) -> Any:
        """Run the command; of a mistyped flag only the closest one is suggested, where click sorts several by name."""
        try:
            return super().invoke(ctx)
        except click.NoSuchOption as error:
            closest = list(error.possibilities or ())[:1]
            raise click.NoSuchOption(error.option_name, possibilities=closest, ctx=error.ctx) from None

    def format_commands(self, ctx: Context, formatter: click.HelpFormatter) -> None:
        """Write the commands, topic by topic."""
        width = max(map(len, self._lazy))
        for topic, names in self._topics.items():
            if names:
                with formatter.section(topic):
                    formatter.write_dl([(name.ljust(width), self._lazy[name][1]) for name in names])

    def format_epilog(self, ctx: Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, then the last lines."""
        if self._examples:
            with formatter.section("Examples"):
                formatter.write_dl(self._examples, col_max=60)
        super().format_epilog(ctx, formatter)
