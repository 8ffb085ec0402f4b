"""The former name of `utils.memory`; it warns where a name is taken from it."""

from __future__ import annotations

import warnings
from typing import Any

from paceline.compat.accelerate.utils import memory


def __getattr__(name: str) -> Any:
    if name not in memory.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn("accelerate.memory_utils is now accelerate.utils.memory", FutureWarning, stacklevel=2)
    return getattr(memory, name)
