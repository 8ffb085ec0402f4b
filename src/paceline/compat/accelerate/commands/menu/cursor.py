"""The cursor of Accelerate's menus, which are not supported."""

from __future__ import annotations

from paceline.compat.accelerate.settings.refusals import MENU, refused_names

_NAMES = """
    hide hide_cursor show_cursor
"""

__getattr__, __all__ = refused_names(__name__, _NAMES, MENU)
