"""The former name of `utils.memory`."""

from __future__ import annotations

import warnings

from paceline.compat.accelerate.utils.memory import find_executable_batch_size

__all__ = ["find_executable_batch_size"]

warnings.warn("accelerate.memory_utils is now accelerate.utils.memory", FutureWarning, stacklevel=2)
