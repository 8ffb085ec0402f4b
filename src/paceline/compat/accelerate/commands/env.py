"""`accelerate env`: what a bug report needs."""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path
from shutil import which
from typing import Any

import numpy
import psutil
import torch

from paceline.accelerator.environment_report import environment_report
from paceline.compat.accelerate.commands.config.config_args import default_config_file, load_config_from_file
from paceline.compat.accelerate.commands.utils import command_parser, run_command
from paceline.compat.install import VERSION
from paceline.environment import version

__all__ = ["env_command", "env_command_parser", "main"]


def env_command_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """Return the parser.

    Args:
        subparsers: Where to add it as the command `env`, if it is one of several.
    """
    parser = command_parser("env", subparsers, argparse.ArgumentParser)
    parser.add_argument("--config_file", help="Configuration file to show.")
    parser.set_defaults(func=env_command)
    return parser


def env_command(args: argparse.Namespace) -> dict[str, Any]:
    """Print versions, devices and the configuration file.

    Args:
        args: What the parser returned.

    Returns:
        What Accelerate's own command reports, by its names.
    """
    config: dict[str, Any] | str = "Not found"
    if args.config_file is not None or Path(default_config_file).is_file():
        config = load_config_from_file(args.config_file).to_dict()
    device = torch.accelerator.current_accelerator(check_available=True)
    info: dict[str, Any] = {
        "`Accelerate` version": f"{VERSION} (paceline {version.__version__})",
        "Platform": platform.platform(),
        "`accelerate` bash location": which("accelerate") or "Not found",
        "Python version": platform.python_version(),
        "Numpy version": numpy.__version__,
        "PyTorch version": torch.__version__,
        "PyTorch accelerator": device.type.upper() if device else "N/A",
        "System RAM": f"{psutil.virtual_memory().total / 2**30:.2f} GB",
    }
    if device is not None:
        name = getattr(torch.get_device_module(device), "get_device_name", None)
        info[f"{'GPU' if device.type == 'cuda' else device.type.upper()} type"] = name() if name else device.type
    info["`Accelerate` configs"] = config
    print(environment_report(os.environ).as_text())
    for label, value in info.items():
        print(f"- {label}: {value}")
    return info


def main() -> int:
    """Run `accelerate env`; return the exit code."""
    run_command(env_command, env_command_parser().parse_args())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
