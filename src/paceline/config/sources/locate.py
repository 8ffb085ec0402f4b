"""Which configuration file is read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

FILE_NAME: Final = "default_config.yaml"


def find_config_file(env: Mapping[str, str], asked: Path | None = None) -> Path | None:
    """Return the file that was asked for, else the first default file that exists, else None.

    A file that was asked for, as an argument or by PACELINE_CONFIG_FILE, is returned even if it does not
    exist, so that reading it reports that.
    """
    if asked is not None:
        return asked
    named = env.get("PACELINE_CONFIG_FILE")
    if named:
        return _expand(named, env)
    return next((path for path in _default_files(env) if path.is_file()), None)


def default_config_file(env: Mapping[str, str]) -> Path:
    """Return where the file is looked for first that holds for every launch."""
    return next(_default_files(env))


def is_accelerate_file(file: Path, env: Mapping[str, str]) -> bool:
    """Whether a file is the one that Accelerate's `config` command writes, rather than paceline's own."""
    return file == [*_default_files(env)][-1]


def _default_files(env: Mapping[str, str]) -> Iterator[Path]:
    """Yield paceline's own place, then the one where Accelerate's `config` command writes."""
    cache = _expand(env.get("XDG_CACHE_HOME") or "~/.cache", env)
    own = env.get("PACELINE_HOME")
    if own:
        yield _expand(own, env) / FILE_NAME
    yield cache / "paceline" / FILE_NAME
    hub = env.get("HF_HOME")
    yield (_expand(hub, env) if hub else cache / "huggingface") / "accelerate" / FILE_NAME


def _expand(path: str, env: Mapping[str, str]) -> Path:
    """Replace a leading `~` by HOME of the given mapping, not of this process."""
    if path == "~" or path.startswith("~/"):
        return Path(env.get("HOME", "/")) / path[2:]
    return Path(path)
