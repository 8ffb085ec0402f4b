"""Accelerate's questions about a cluster: `paceline config` asks instead."""

from __future__ import annotations

from typing import Any

from paceline.compat.accelerate.settings.errors import unsupported

__all__ = ["get_cluster_input"]


@unsupported("The questions are those of `paceline config`, which writes a file", "Call config_command(args)")
def get_cluster_input() -> Any:
    """Ask about a cluster: not supported."""
