"""A configuration with parts of it left out or replaced, for commands that run a script in several ways."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from paceline.config import Origin, RunConfig

if TYPE_CHECKING:
    from collections.abc import Iterable

    from paceline.config import Resolved

__all__ = ["LAYOUT", "alone", "variant"]

LAYOUT = ("distributed_type", "strategy", "ddp_config", "fsdp_config", "deepspeed_config", "parallelism_config")
"""What says how several processes share the work."""


def variant(resolved: Resolved, without: Iterable[str] = (), **values: Any) -> Resolved:
    """Return the configuration without some of its top-level keys, and with others."""
    left_out = {*without, *values}
    config = resolved.config
    kept = {name: getattr(config, name) for name in config.model_fields_set - left_out}
    origins = {key: origin for key, origin in resolved.origins.items() if key.partition(".")[0] not in left_out}
    origins |= {key: Origin("flag", "paceline's own check") for key in values}
    return replace(resolved, config=RunConfig(**kept, **values), origins=origins)


def alone(resolved: Resolved) -> Resolved:
    """Return the configuration for one process: nothing of how several share the work, but for an engine's own file."""
    engine = resolved.config.strategy == "deepspeed"
    return variant(resolved, () if engine else LAYOUT, num_processes=1)
