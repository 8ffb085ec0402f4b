"""The flags of `accelerate launch`, made from the schema of the configuration.

The schema knows the names, kinds and descriptions. What is written here is only where Accelerate reads or presets a
flag in another way.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import cache
from typing import Any, Final

from paceline.compat.accelerate.settings.variables import str_to_bool
from paceline.config import Option, options

__all__ = ["OWN_FLAGS", "add_flags", "defaults", "destination"]

# Their value is a word; flags of other sections that are true or false are switches.
_WITH_A_WORD: Final = frozenset({"fsdp_config", "deepspeed_config", "megatron_lm_config", "parallelism_config"})
_READ_AS_BOOL: Final = ("fp8_enable_fsdp_float8_all_gather", "fp8_pad_inner_dim")

_PRESET: Final = {
    "rdzv_backend": "static",
    "rdzv_conf": "",
    "max_restarts": 0,
    "monitor_interval": 0.1,
    "fsdp_version": "1",
    "fsdp_offload_params": "false",
    "fsdp_min_num_params": 100_000_000,
    "fsdp_sharding_strategy": "FULL_SHARD",
    "fsdp_reshard_after_forward": "true",
    "fsdp_forward_prefetch": "false",
    "fsdp_use_orig_params": "true",
    "fsdp_cpu_ram_efficient_loading": "true",
    "fsdp_sync_module_states": "true",
    "fsdp_activation_checkpointing": "false",
    "fsdp_activation_checkpointing_offload": "false",
    "megatron_lm_use_custom_fsdp": False,
    "megatron_lm_no_load_optim": False,
    "megatron_lm_eod_mask_loss": False,
    "megatron_lm_overlap_cpu_optimizer_d2h_h2d": False,
    "megatron_lm_no_save_optim": False,
    "megatron_lm_optimizer_cpu_offload": False,
    "megatron_lm_use_precision_aware_optimizer": False,
    "fp8_backend": None,
    "dynamo_backend": None,
}
"""What a flag is without being given, where that is not the rule of `_preset`."""

_DESTINATIONS: Final = {"tpu_cluster": "tpu_use_cluster"}
_TYPES: Final[dict[str, Any]] = {
    "num_machines": int,
    "gradient_clipping": float,
    "fsdp_reshard_after_forward": str,
    "parallelism_config_sp_seq_length": str,
}

OWN_FLAGS: Final = ("strategy", "preflight", "as_accelerate", "timeout", "hang_timeout")
"""Flags of paceline at the top level; Accelerate has none of these names, nor those of `ddp_config`."""


def destination(option: Option) -> str:
    """Return the attribute that holds a flag's value."""
    return _DESTINATIONS.get(option.flag, option.flag)


@cache
def defaults() -> dict[str, Any]:
    """Return what each attribute is when no flag is given."""
    values = {destination(option): _preset(option) for option in options()}
    others = {"quiet": None, "module": None, "no_python": None, "tee": "0", "log_dir": None, "role": "default"}
    return {**values, **others, "config_file": None, "aws_access_key_id": None, "aws_secret_access_key": None}


def _preset(option: Option) -> Any:
    if option.flag in _PRESET:
        return _PRESET[option.flag]
    if option.section in ("megatron_lm_config", "fp8_config", "parallelism_config", "dynamo_config"):
        return option.default if option.default is not None or not _is_switch(option) else False
    return False if _is_switch(option) and option.flag not in ("debug", *OWN_FLAGS) else None


def _is_switch(option: Option) -> bool:
    if option.kind != "bool" or option.section == "ddp_config":
        return False
    if option.flag == "use_parallelism_config":
        return True
    return option.section not in _WITH_A_WORD and option.flag not in _READ_AS_BOOL


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Declare every flag that sets a part of the configuration, topic by topic."""
    groups: dict[str, Any] = {}
    for option in options():
        if option.topic not in groups:
            groups[option.topic] = parser.add_argument_group(option.topic)
        groups[option.topic].add_argument(f"--{option.flag}", **dict(_declaration(option)))


def _declaration(option: Option) -> Iterator[tuple[str, Any]]:
    yield "dest", destination(option)
    yield "default", defaults()[destination(option)]
    yield "help", option.description.replace("%", "%%")
    if _is_switch(option):
        yield "action", "store_true"
        return
    yield "metavar", "|".join(option.choices) or option.kind.upper()
    yield "type", _type(option)
    if option.flag in ("vm", "env"):
        yield "action", "append"


def _type(option: Option) -> Any:
    if option.flag in _TYPES:
        return _TYPES[option.flag]
    if option.flag == "fp8_override_linear_precision":
        return _three_words
    if option.flag in _READ_AS_BOOL:
        return str_to_bool
    is_of_paceline = option.section == "ddp_config" or option.flag in OWN_FLAGS
    if is_of_paceline or option.kind in ("str", "choice"):
        return str
    return {"bool": str, "int": int, "float": float}[option.kind]


def _three_words(text: str) -> tuple[Any, ...]:
    return tuple(str_to_bool(word.strip()) for word in text.split(","))
