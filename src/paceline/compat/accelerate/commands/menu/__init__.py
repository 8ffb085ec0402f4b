"""Accelerate's menu on a terminal: `paceline config` asks its questions in another way."""

from __future__ import annotations

from paceline.compat.accelerate.commands.menu.selection_menu import BulletMenu

__all__ = ["BulletMenu"]
