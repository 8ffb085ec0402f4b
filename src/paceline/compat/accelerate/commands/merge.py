"""`accelerate merge-weights`: the shards of an FSDP checkpoint as one file."""

from __future__ import annotations

import argparse
from typing import Any

from paceline.compat.accelerate.commands.utils import command_parser, run_command
from paceline.compat.accelerate.utils.fsdp_utils import merge_fsdp_weights

__all__ = ["main", "merge_command", "merge_command_parser"]


def merge_command_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """Return the parser.

    Args:
        subparsers: Where to add it as the command `merge-weights`, if it is one of several.
    """
    text = "Write the weights of a sharded checkpoint as one file. They must fit into host memory."
    parser = command_parser("merge-weights", subparsers, description=text)
    parser.add_argument("checkpoint_directory", help="Folder with the shards.")
    parser.add_argument("output_path", help="Folder for the file.")
    parser.add_argument(
        "--unsafe_serialization", action="store_true", help="Write a .bin file of torch instead of safetensors."
    )
    parser.add_argument("--remove_checkpoint_dir", action="store_true", help="Delete the shards afterwards.")
    parser.set_defaults(func=merge_command)
    return parser


def merge_command(args: argparse.Namespace) -> None:
    """Merge the shards.

    Args:
        args: What the parser returned.
    """
    merge_fsdp_weights(
        args.checkpoint_directory, args.output_path, not args.unsafe_serialization, args.remove_checkpoint_dir
    )


def main() -> None:
    """Run `accelerate merge-weights`."""
    run_command(merge_command, merge_command_parser().parse_args())


if __name__ == "__main__":
    main()
