"""The launcher: it plans the ranks of this machine, starts and supervises them, and reports the first failure.

Names are imported on first use: every worker imports this package before the script, and must not pay for the
launcher's own imports.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paceline.launch.accelerators import detect
    from paceline.launch.command import Command
    from paceline.launch.launcher import launch
    from paceline.launch.notebook.launchers import debug_launcher, notebook_launcher
    from paceline.launch.planning import LaunchPlan, plan
    from paceline.launch.schedulers.deepspeed import launch_deepspeed, plan_deepspeed

__all__ = [
    "Command",
    "LaunchPlan",
    "debug_launcher",
    "detect",
    "launch",
    "launch_deepspeed",
    "notebook_launcher",
    "plan",
    "plan_deepspeed",
]

_MODULES = {
    "Command": "command",
    "LaunchPlan": "planning",
    "debug_launcher": "notebook.launchers",
    "detect": "accelerators",
    "launch": "launcher",
    "launch_deepspeed": "schedulers.deepspeed",
    "notebook_launcher": "notebook.launchers",
    "plan": "planning",
    "plan_deepspeed": "schedulers.deepspeed",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"paceline.launch.{_MODULES[name]}"), name)
