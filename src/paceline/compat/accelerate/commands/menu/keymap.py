"""Names of keys of Accelerate's menus, which are not supported."""

from __future__ import annotations

from paceline.compat.accelerate.settings.refusals import MENU, refused_names

_NAMES = """
    get_character get_raw_chars
"""

__getattr__, __all__ = refused_names(__name__, _NAMES, MENU)
