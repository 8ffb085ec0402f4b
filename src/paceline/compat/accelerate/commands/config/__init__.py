"""The configuration file, as its keys and values."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from paceline.config.sources import locate

__all__ = ["ConfigFile", "default_config_file", "load_config_from_file"]

default_config_file = str(locate.find_config_file(os.environ) or locate.default_config_file(os.environ))
"""The file that `paceline launch` reads without `--config_file`; it may not exist."""


class ConfigFile:
    """The keys of a configuration file, also as attributes.

    Args:
        values: Values by key.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._values:
            raise AttributeError(name)
        return self._values[name]

    def to_dict(self) -> dict[str, Any]:
        """Return values by key."""
        return dict(self._values)


def load_config_from_file(config_file: str | os.PathLike[str] | None) -> ConfigFile:
    """Read a file in YAML or JSON.

    Args:
        config_file: The file; None reads the default one.

    Raises:
        FileNotFoundError: There is no such file.
    """
    path = Path(default_config_file if config_file is None else config_file)
    return ConfigFile(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
