"""The watchdog for a launched script that opens its process group itself, without an Accelerator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.collectives.watchdog.watch import start_watch
from paceline.config import Resolved
from paceline.environment.error_file import ErrorFile
from paceline.environment.world import World

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["start_bare_watchdog"]


def start_bare_watchdog(env: Mapping[str, str]) -> None:
    """Start the watchdog that an Accelerator would start, from the launcher's variables."""
    config = Resolved.from_json(env["PACELINE_CONFIG"]).config
    start_watch(World.read(env), ErrorFile.read(env), config.hang_timeout)
