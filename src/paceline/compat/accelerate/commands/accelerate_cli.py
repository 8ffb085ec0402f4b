"""The command `accelerate`, with all of its commands: `python -m accelerate.commands.accelerate_cli`."""

from __future__ import annotations

import sys

from paceline.compat.accelerate.commands.config import get_config_parser
from paceline.compat.accelerate.commands.env import env_command_parser
from paceline.compat.accelerate.commands.estimate import estimate_command_parser
from paceline.compat.accelerate.commands.launch import launch_command_parser
from paceline.compat.accelerate.commands.merge import merge_command_parser
from paceline.compat.accelerate.commands.test import test_command_parser
from paceline.compat.accelerate.commands.to_fsdp2 import to_fsdp2_command_parser
from paceline.compat.accelerate.commands.tpu import tpu_command_parser
from paceline.compat.accelerate.commands.utils import CustomArgumentParser, run_command

__all__ = ["main"]


def main() -> None:
    """Run one of the commands."""
    parser = CustomArgumentParser("accelerate", usage="accelerate <command> [<args>]", allow_abbrev=False)
    commands = parser.add_subparsers()
    for add in (
        get_config_parser,
        estimate_command_parser,
        env_command_parser,
        launch_command_parser,
        merge_command_parser,
        tpu_command_parser,
        test_command_parser,
        to_fsdp2_command_parser,
    ):
        add(commands)
    args = parser.parse_args()
    if not hasattr(args, "func"):
        parser.print_help()
        sys.exit(1)
    run_command(args.func, args)


if __name__ == "__main__":
    main()
