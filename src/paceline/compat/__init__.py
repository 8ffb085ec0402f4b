"""Runs programs written for Accelerate on paceline, unchanged: the transformers `Trainer`, TRL, PEFT, plain scripts.

`install_as_accelerate()` makes `import accelerate` mean `paceline.compat.accelerate` in this process and in those that
it starts. `python -m paceline.compat script.py` and `paceline launch --as_accelerate` do it before the script runs.
"""

from __future__ import annotations

from paceline.compat.install import install_as_accelerate, is_installed, uninstall_as_accelerate

__all__ = ["install_as_accelerate", "is_installed", "uninstall_as_accelerate"]
