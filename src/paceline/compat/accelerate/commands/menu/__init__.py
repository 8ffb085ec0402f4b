"""Accelerate's menu on a terminal: `paceline config` asks its questions in another way."""

from __future__ import annotations

from paceline.environment.lazy_names import lazy_attributes

__getattr__, __all__ = lazy_attributes(__name__, {"selection_menu": "BulletMenu"})
