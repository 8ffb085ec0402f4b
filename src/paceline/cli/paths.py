"""Paths on the command line."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click
from typing_extensions import override

if TYPE_CHECKING:
    from click import Context, Parameter

__all__ = ["PathType"]


class PathType(click.Path):
    """A path in which `~` is the user's own folder, also where no shell has seen to it (`--log_dir=~/logs`)."""

    @override
    def convert(self, value: Any, param: Parameter | None, ctx: Context | None) -> Any:
        return super().convert(os.path.expanduser(value), param, ctx)  # noqa: PTH111 - as a shell does
