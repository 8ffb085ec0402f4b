"""Keys of Accelerate's menus, which are not supported."""

from __future__ import annotations

from paceline.compat.accelerate.settings.refusals import MENU, refused_names

_NAMES = """
    KeyHandler mark mark_multiple register
"""

__getattr__, __all__ = refused_names(__name__, _NAMES, MENU)
