"""`accelerate config default`: a file for this machine without questions."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Literal

import torch

from paceline.compat.accelerate.commands.config.config_args import ClusterConfig, default_json_config_file
from paceline.compat.accelerate.settings.errors import InvalidValueError

__all__ = ["default_command_parser", "default_config_command", "write_basic_config"]

_PRECISIONS = ("no", "fp16", "bf16", "fp8")
_OF_DEVICE = {"cuda": "GPU"}


def write_basic_config(
    mixed_precision: str = "no", save_location: str = default_json_config_file
) -> Path | Literal[False]:
    """Write a file for all devices of this machine.

    Args:
        mixed_precision: `no`, `fp16`, `bf16` or `fp8`.
        save_location: The file; one that exists is kept.

    Returns:
        The file, or False where it existed.

    Raises:
        InvalidValueError: There is no such precision.
    """
    path = Path(save_location)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        print(f"{save_location} exists and is kept. Name another file, or change it with `paceline config`.")
        return False
    precision = mixed_precision.lower()
    if precision not in _PRECISIONS:
        raise InvalidValueError(
            f"mixed_precision={mixed_precision!r}", "There is no such precision", f"Use {', '.join(_PRECISIONS)}"
        )
    ClusterConfig.from_values({**_machine(), "mixed_precision": precision}, save_location).to_json_file(path)
    return path


def _machine() -> dict[str, Any]:
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return {"use_cpu": True, "num_processes": 1, "distributed_type": "NO"}
    count = torch.accelerator.device_count()
    kind = f"MULTI_{_OF_DEVICE.get(device.type, device.type.upper())}" if count > 1 else "NO"
    return {"use_cpu": False, "num_processes": count, "distributed_type": kind}


def default_command_parser(parser: Any, parents: list[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add the command `default`.

    Args:
        parser: The subcommands of `config`.
        parents: Parsers whose arguments it takes over.
    """
    text = "Write a file for this machine, without questions."
    added: argparse.ArgumentParser = parser.add_parser("default", parents=parents, help=text, description=text)
    added.add_argument(
        "--config_file", default=default_json_config_file, dest="save_location", help="File to write [%(default)s]."
    )
    added.add_argument("--mixed_precision", choices=_PRECISIONS[:3], default="no", help="Precision of the run.")
    added.set_defaults(func=default_config_command)
    return added


def default_config_command(args: argparse.Namespace) -> None:
    """Write the file.

    Args:
        args: What the parser returned.
    """
    file = write_basic_config(args.mixed_precision, args.save_location)
    if file:
        print(f"Wrote {file}")
