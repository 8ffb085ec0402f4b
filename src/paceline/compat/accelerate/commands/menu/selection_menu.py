"""A menu of choices on a terminal, which is not supported."""

from __future__ import annotations

from paceline.compat.accelerate.settings.refusals import MENU, refused_names

__getattr__, __all__ = refused_names(__name__, "BulletMenu", MENU)
