"""Installing torch_xla, which is not supported."""

from __future__ import annotations

from paceline.compat.accelerate.settings.refusals import TPU, refused_names

_NAMES = """
    install_xla
"""

__getattr__, __all__ = refused_names(__name__, _NAMES, TPU)
