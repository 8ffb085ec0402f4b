"""Conversions of models for Transformer Engine, which are not supported."""

from __future__ import annotations

from paceline.compat.accelerate.settings.refusals import TRANSFORMER_ENGINE, refused_names

_NAMES = """
    apply_fp8_autowrap contextual_fp8_autocast convert_model has_transformer_engine_layers
"""

__getattr__, __all__ = refused_names(__name__, _NAMES, TRANSFORMER_ENGINE)
