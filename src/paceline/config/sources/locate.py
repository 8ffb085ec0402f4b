"""Finds the configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

FILE_NAME: Final = "default_config.yaml"


def find_config_file(env: Mapping[str, str], explicit: Path | None = None) -> Path | None:
    """Return the configuration file to read.

    Args:
        env: The environment.
        explicit: A file named on the command line.

    Returns:
        The explicit file, else that of PACELINE_CONFIG_FILE, else the first default file that exists, else None.
        The first two are returned even if they do not exist, so that reading them reports that.
    """
    if explicit is not None:
        return explicit
    named = env.get("PACELINE_CONFIG_FILE")
    if named:
        return _expand(named, env)
    return next((path for path in _default_files(env) if path.is_file()), None)


def default_config_file(env: Mapping[str, str]) -> Path:
    """Return the default file of the user, whether it exists or not."""
    return next(_default_files(env))


def is_accelerate_file(file: Path, env: Mapping[str, str]) -> bool:
    """Whether a file is the default file of Accelerate's `config` command, not of paceline."""
    return file == [*_default_files(env)][-1]


def _default_files(env: Mapping[str, str]) -> Iterator[Path]:
    """Yield the default files of paceline, then the one that Accelerate's `config` command writes."""
    cache = _expand(env.get("XDG_CACHE_HOME") or "~/.cache", env)
    own = env.get("PACELINE_HOME")
    if own:
        yield _expand(own, env) / FILE_NAME
    yield cache / "paceline" / FILE_NAME
    hub = cache / "huggingface"
    if env.get("HF_HOME"):
        hub = _expand(env["HF_HOME"], env)
    yield hub / "accelerate" / FILE_NAME


def _expand(path: str, env: Mapping[str, str]) -> Path:
    """Replace a leading `~` by HOME of the given mapping, not of this process."""
    if path == "~" or path.startswith("~/"):
        return Path(env.get("HOME", "/")) / path[2:]
    return Path(path)
