"""From what was typed to one configuration: the file in force, the environment, and what is detected."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from paceline.cli.interrupts import import_torch
from paceline.config import default_config_file, find_config_file, is_accelerates, resolve
from paceline.config.sources.layers import unread_variables
from paceline.launch.clusters import check_against, detect_cluster

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from paceline.config import Resolved

__all__ = ["resolve_sources"]


def resolve_sources(flags: Mapping[str, object], config_file: Path | None) -> Resolved:
    """Read flags, environment and file; look for devices only when nobody says how many processes to start.

    Args:
        flags: Flags that were typed, by name.
        config_file: The file that was asked for; without one, the default file that is found.

    Raises:
        ConfigError: With everything that is wrong, from all sources at once.
        WorldError: The variables of a scheduler are incomplete or contradict each other.
    """
    file = find_config_file(os.environ, config_file)
    cluster = detect_cluster(os.environ)
    told = dict(cluster.values) if cluster is not None else {}
    resolved = resolve(flags=flags, env=os.environ, file=file, detected=told)
    if cluster is not None:
        check_against(cluster, resolved)
    config = resolved.config
    # Of several machines each looks at its own devices, and none at the others'.
    if config.num_processes is None and config.max_machines == 1 and not config.spans_machines:
        # torch is imported here, and only then.
        import_torch()
        from paceline.launch.accelerators import detect

        # What is there depends on whether the CPU was asked for, which any source may have done.
        found = detect(os.environ, config.use_cpu)
        resolved = resolve(flags=flags, env=os.environ, file=file, detected={**found, **told})
    was_asked = config_file is not None or os.environ.get("PACELINE_CONFIG_FILE")
    if file is not None and not was_asked and is_accelerates(file, os.environ):
        own = default_config_file(os.environ)
        note = f"{file}: Accelerate's file is read, since there is no {own}; `paceline config` writes that"
        resolved = replace(resolved, notes=(note, *resolved.notes))
    return replace(resolved, notes=(*resolved.notes, *unread_variables(os.environ)))
