"""`accelerate tpu-config`: prints the command that sets up the machines of a TPU; paceline does not run it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from paceline.compat.accelerate.commands.config.config_args import default_config_file, load_config_from_file
from paceline.compat.accelerate.commands.utils import command_parser, run_command
from paceline.compat.accelerate.settings.errors import InvalidValueError, UnsupportedError

__all__ = ["main", "tpu_command_launcher", "tpu_command_parser"]

_SOURCE = "git+https://github.com/huggingface/accelerate.git"


def tpu_command_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """Return the parser.

    Args:
        subparsers: Where to add it as the command `tpu-config`, if it is one of several.
    """
    text = "Print the command that sets up the machines of a TPU (with --debug; running it is not supported)."
    parser = command_parser("tpu-config", subparsers, argparse.ArgumentParser, description=text)
    parser.add_argument("--config_file", help="Configuration file to read.")
    parser.add_argument("--tpu_name", help="Name of the TPU.")
    parser.add_argument("--tpu_zone", help="Its zone.")
    parser.add_argument("--use_alpha", action="store_true", help="Use `gcloud alpha`.")
    parser.add_argument("--command_file", help="File with the commands for each machine, one a line.")
    parser.add_argument("--command", action="append", nargs="+", help="A command for each machine; can be repeated.")
    parser.add_argument("--install_accelerate", action="store_true", help="Install Accelerate on each machine first.")
    parser.add_argument("--accelerate_version", default="latest", help="The version: latest, dev, or a number.")
    parser.add_argument("--debug", action="store_true", help="Print the command.")
    parser.set_defaults(func=tpu_command_launcher)
    return parser


def tpu_command_launcher(args: argparse.Namespace) -> None:
    """Print the command.

    Args:
        args: What the parser returned.

    Raises:
        InvalidValueError: There is no command for the machines.
        UnsupportedError: The command was to be run, not printed.
    """
    _complete(args)
    commands = _commands(args)
    program = ["gcloud", *(["alpha"] if args.use_alpha else []), "compute", "tpus", "tpu-vm", "ssh"]
    script = "; ".join(["cd /usr/share", *_installation(args), *commands])
    line = [*program, str(args.tpu_name), "--zone", str(args.tpu_zone), "--command", script, "--worker", "all"]
    print(f"Running {' '.join(line)}")
    if not args.debug:
        raise UnsupportedError(
            "The machines of a TPU were to be set up",
            "paceline trains on GPUs and CPUs, and starts nothing on TPUs",
            "Run the printed command yourself, and train with Accelerate itself, without the switch",
        )


def _complete(args: argparse.Namespace) -> None:
    """Take from the configuration file what the flags leave open."""
    if args.config_file is None and not Path(default_config_file).is_file():
        return
    file: Any = load_config_from_file(args.config_file)
    if not args.command:
        args.command_file = args.command_file or file.command_file
        args.command = file.commands
    args.tpu_name = args.tpu_name or file.tpu_name
    args.tpu_zone = args.tpu_zone or file.tpu_zone


def _commands(args: argparse.Namespace) -> list[str]:
    if args.command_file:
        return Path(args.command_file).read_text(encoding="utf-8").splitlines()
    if not args.command:
        raise InvalidValueError(
            "There is no command for the machines",
            "They would only be connected to",
            "Give --command or --command_file, or the key in the configuration file",
        )
    return [line for words in args.command for line in (words if isinstance(words, list) else [words])]


def _installation(args: argparse.Namespace) -> list[str]:
    if not args.install_accelerate:
        return []
    what = {"latest": "accelerate -U", "dev": _SOURCE}.get(args.accelerate_version)
    return [f"pip install {what or f'accelerate=={args.accelerate_version}'}"]


def main() -> None:
    """Run `accelerate tpu-config`."""
    run_command(tpu_command_launcher, tpu_command_parser().parse_args())


if __name__ == "__main__":
    main()
