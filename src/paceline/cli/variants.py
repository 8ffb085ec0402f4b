"""Variants of a configuration, for commands that run the same training in several ways."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from paceline.config import Origin, RunConfig

if TYPE_CHECKING:
    from collections.abc import Iterable

    from paceline.config import Resolved

__all__ = ["LAYOUT", "one_process", "variant"]

LAYOUT = ("distributed_type", "strategy", "ddp_config", "fsdp_config", "deepspeed_config", "parallelism_config")
"""The keys that distribute a training over processes."""


def variant(resolved: Resolved, without: Iterable[str] = (), **values: Any) -> Resolved:
    """Return the configuration without some top-level keys and with other values.

    Args:
        resolved: The configuration.
        without: Keys to leave at their defaults.
        **values: Keys to replace.
    """
    left_out = {*without, *values}
    config = resolved.config
    kept = {name: getattr(config, name) for name in config.model_fields_set - left_out}
    origins = {key: origin for key, origin in resolved.origins.items() if key.partition(".")[0] not in left_out}
    origins |= {key: Origin("flag", "paceline's own check") for key in values}
    return replace(resolved, config=RunConfig(**kept, **values), origins=origins)


def one_process(resolved: Resolved) -> Resolved:
    """Return the configuration for one process; DeepSpeed keeps its section, with the engine's own JSON."""
    engine = resolved.config.strategy == "deepspeed"
    return variant(resolved, () if engine else LAYOUT, num_processes=1)
