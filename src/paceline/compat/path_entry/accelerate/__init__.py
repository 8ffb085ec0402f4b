"""Turns the switch on in a process that was started by one in which it is on, at its first `import accelerate`."""

from __future__ import annotations

import importlib
import sys

try:
    from paceline.compat import install_as_accelerate
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"No module named {error.name!r}: PYTHONPATH says that accelerate is paceline here, and this Python "
        f"({sys.executable}) has no paceline. Install it there, or remove {__path__[0]!r} from PYTHONPATH.",
        name=error.name,
    ) from error

del sys.modules[__name__]  # so that the switch does not take this module for the real package
install_as_accelerate(ignore_earlier_imports=True)
sys.modules[__name__] = importlib.import_module("paceline.compat.accelerate")
