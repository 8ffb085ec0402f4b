"""A group of commands of which only the called one is imported."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["LazyGroup"]


class LazyGroup(click.Group):
    """Lists its commands without importing them: `paceline --help` needs no torch.

    Args:
        lazy: Name of each command to its module, which holds it as `command`, and to the line in the list.
        topics: Headings of the list, each with the commands under it; what is under none comes last.
        examples: Command lines to try, with what each does; shown at the end.
        settings: What click takes besides.
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

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the commands, in the order of the list."""
        return list(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command that is called."""
        if cmd_name not in self._lazy:
            return None
        command: click.Command = import_module(self._lazy[cmd_name][0]).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; click itself would look for a mistyped one among those that are imported."""
        close = get_close_matches(args[0], self._lazy, n=1)
        if close and args[0] not in self._lazy and not ctx.resilient_parsing:
            raise click.UsageError(f"No such command {args[0]!r}. Did you mean {close[0]!r}?", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands, topic by topic."""
        width = max(map(len, self._lazy))
        for topic, names in self._topics.items():
            if names:
                with formatter.section(topic):
                    formatter.write_dl([(name.ljust(width), self._lazy[name][1]) for name in names])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, then the last lines."""
        if self._examples:
            with formatter.section("Examples"):
                formatter.write_dl(self._examples, col_max=60)
        super().format_epilog(ctx, formatter)
