"""From one command to N ranks on this machine, and from their failures to one report.

The names are resolved on first use: every worker imports this package before the script, and must not pay
for the launcher's own imports.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paceline.launch.command import Command
    from paceline.launch.deepspeed_runners import launch_machines, plan_machines
    from paceline.launch.detection import detect
    from paceline.launch.launcher import launch
    from paceline.launch.notebook.functions import debug_launcher, notebook_launcher
    from paceline.launch.planning import Plan, plan

__all__ = [
    "Command",
    "Plan",
    "debug_launcher",
    "detect",
    "launch",
    "launch_machines",
    "notebook_launcher",
    "plan",
    "plan_machines",
]


def __getattr__(name: str) -> object:
    match name:
        case "Command":
            from paceline.launch.command import Command

            return Command
        case "Plan" | "plan":
            from paceline.launch import planning

            return getattr(planning, name)
        case "launch_machines" | "plan_machines":
            from paceline.launch import deepspeed_runners

            return getattr(deepspeed_runners, name)
        case "debug_launcher" | "notebook_launcher":
            from paceline.launch.notebook import functions

            return getattr(functions, name)
        case "detect":
            from paceline.launch.detection import detect

            return detect
        case "launch":
            from paceline.launch.launcher import launch

            return launch
        case _:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
