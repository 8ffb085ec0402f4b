"""The configuration of a command: from flags, environment, file and what is detected; and variants of it."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from paceline.cli.interrupts import import_torch
from paceline.config import Origin, RunConfig, default_config_file, find_config_file, is_accelerate_file, resolve
from paceline.config.sources.layers import unread_variables
from paceline.launch.clusters import check_against, detect_cluster

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from paceline.config import Resolved

__all__ = ["LAYOUT", "one_process", "resolve_sources", "variant"]

LAYOUT = ("distributed_type", "strategy", "ddp_config", "fsdp_config", "deepspeed_config", "parallelism_config")
"""The keys that distribute a training over processes."""


def resolve_sources(flags: Mapping[str, object], config_file: Path | None, *, starts_ranks: bool = True) -> Resolved:
    """Read all sources; detect devices (which imports torch) only when no source sets the number of processes.

    Args:
        flags: Flags that were given, by name.
        config_file: The file of `--config_file`; None reads the default file, if there is one.
        starts_ranks: Whether the command starts ranks, whose packages must then be installed.

    Returns:
        The configuration.

    Raises:
        ConfigError: With everything that is wrong, from all sources at once.
        WorldError: The variables of a scheduler are incomplete or contradict each other.
    """
    file = find_config_file(os.environ, config_file)
    cluster = detect_cluster(os.environ)
    from_cluster = {}
    if cluster is not None:
        from_cluster = dict(cluster.values)
    read = partial(resolve, flags=flags, env=os.environ, file=file, starts_ranks=starts_ranks)
    resolved = read(detected=from_cluster)
    if cluster is not None:
        check_against(cluster, resolved)
    config = resolved.config
    # Of several machines each detects its own devices when it starts its ranks.
    if config.num_processes is None and config.max_machines == 1 and not config.spans_machines:
        import_torch()
        from paceline.launch.accelerators import detect

        # Which devices count depends on use_cpu, which any source may set.
        devices = detect(os.environ, config.use_cpu)
        resolved = read(detected={**devices, **from_cluster})
    is_explicit = config_file is not None or os.environ.get("PACELINE_CONFIG_FILE")
    if file is not None and not is_explicit and is_accelerate_file(file, os.environ):
        own = default_config_file(os.environ)
        note = f"{file}: reading Accelerate's file, since there is no {own}; `paceline config` writes one"
        resolved = replace(resolved, notes=(note, *resolved.notes))
    return replace(resolved, notes=(*resolved.notes, *unread_variables(os.environ)))


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
