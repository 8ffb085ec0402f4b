"""`accelerate to-fsdp2`: a file of FSDP version 1 as one of version 2."""

from __future__ import annotations

import argparse
import enum
import logging
from pathlib import Path
from typing import Any, Final

import yaml

from paceline.compat.accelerate.commands.utils import command_parser, run_command
from paceline.compat.accelerate.settings.errors import InvalidValueError

__all__ = [
    "ARGUMENT_KEY_MAPPING",
    "ARGUMENT_VALUE_MAPPING",
    "ConversionStatus",
    "convert_config_to_fsdp2",
    "load_config",
    "main",
    "to_fsdp2_command",
    "to_fsdp2_command_parser",
]

_LOG = logging.getLogger("accelerate.commands.to_fsdp2")  # where programs look for these messages


class ConversionStatus(enum.Enum):
    """What became of a key that version 2 does not have."""

    NOT_YET_IMPLEMENTED = 0
    REMOVED = -1


_KEPT: Final = (
    *("version", "reshard_after_forward", "auto_wrap_policy", "cpu_ram_efficient_loading", "offload_params"),
    *("state_dict_type", "transformer_layer_cls_to_wrap", "min_num_params", "activation_checkpointing"),
)
ARGUMENT_KEY_MAPPING: Final[dict[str, str | ConversionStatus]] = {
    **{f"fsdp_{name}": f"fsdp_{name}" for name in _KEPT},
    "fsdp_sharding_strategy": "fsdp_reshard_after_forward",
    "fsdp_backward_prefetch": ConversionStatus.REMOVED,
    "fsdp_sync_module_states": ConversionStatus.REMOVED,
    "fsdp_use_orig_params": ConversionStatus.REMOVED,
    "fsdp_forward_prefetch": ConversionStatus.NOT_YET_IMPLEMENTED,
}
"""What each key of version 1 is called in version 2."""
_RESHARDS: Final = {
    "FULL_SHARD": True,
    "HYBRID_SHARD": True,
    "SHARD_GRAD_OP": False,
    "HYBRID_SHARD_ZERO2": False,
    "NO_SHARD": False,
}
ARGUMENT_VALUE_MAPPING: Final = {"fsdp_sharding_strategy": _RESHARDS, "fsdp_reshard_after_forward": _RESHARDS}
"""What the values of a key are in version 2."""


def convert_config_to_fsdp2(config: dict[str, Any]) -> dict[str, Any]:
    """Convert the section `fsdp_config`.

    Args:
        config: The keys of a file; changed in place.

    Returns:
        The same dictionary.
    """
    section = config.get("fsdp_config") or {}
    if not section:
        return config
    if int(section.get("fsdp_version", 1)) == 2:
        _LOG.warning("Config already specifies FSDP2, skipping conversion...")
        return config
    new: dict[str, Any] = {}
    for key, value in section.items():
        became = ARGUMENT_KEY_MAPPING.get(key, key)
        if isinstance(became, ConversionStatus):
            _LOG.warning("%s: %s is left out: FSDP2 has no such setting.", key, value)
        else:
            new[became] = ARGUMENT_VALUE_MAPPING.get(key, {}).get(value, value)
    config["fsdp_config"] = {**new, "fsdp_version": 2}
    return config


def load_config(config_file: str) -> dict[str, Any]:
    """Read a file.

    Args:
        config_file: The file.

    Returns:
        Its keys and values.

    Raises:
        InvalidValueError: It is empty.
    """
    values = yaml.safe_load(Path(config_file).read_text(encoding="utf-8"))
    if not values:
        raise InvalidValueError(f"{config_file} is empty", "There is nothing to convert", "Name another file")
    return dict(values)


def to_fsdp2_command_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """Return the parser.

    Args:
        subparsers: Where to add it as the command `to-fsdp2`, if it is one of several.
    """
    text = "Convert a configuration file from FSDP version 1 to version 2."
    parser = command_parser("to-fsdp2", subparsers, description=text)
    parser.add_argument("--config_file", required=True, help="File to convert.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the file that is written.")
    parser.add_argument("--output_file", help="File to write; with the flag above it may be left out.")
    parser.set_defaults(func=to_fsdp2_command)
    return parser


def to_fsdp2_command(args: argparse.Namespace) -> None:
    """Convert the file.

    Args:
        args: What the parser returned.

    Raises:
        FileNotFoundError: There is no such file.
        FileExistsError: The file to write exists.
        InvalidValueError: No file to write was named.
    """
    if not Path(args.config_file).exists():
        raise FileNotFoundError(f"There is no file {args.config_file!r}. It was to be converted. Check the path.")
    if not args.overwrite and args.output_file is None:
        raise InvalidValueError(
            "Neither --output_file nor --overwrite was given",
            "There is no file to write",
            "Name one, or let the file itself be replaced with --overwrite",
        )
    if not args.overwrite and Path(args.output_file).exists():
        raise FileExistsError(
            f"{args.output_file} exists. It would be replaced. Name another --output_file, or add --overwrite."
        )
    target = args.config_file if args.output_file is None else args.output_file
    text = yaml.safe_dump(convert_config_to_fsdp2(load_config(args.config_file)))
    Path(target).write_text(text, encoding="utf-8")


def main() -> None:
    """Run `accelerate to-fsdp2`."""
    run_command(to_fsdp2_command, to_fsdp2_command_parser().parse_args())


if __name__ == "__main__":
    main()
