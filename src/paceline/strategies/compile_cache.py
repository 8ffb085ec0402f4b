"""Where compiled code is kept between runs, how large that may become, and how long it took to compile.

torch keeps it in a folder for temporary files, which may be emptied at the next boot. A folder in the user's cache
survives it, and is emptied as a whole once it is too large: parts of it refer to each other.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.environment.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Mapping

    from paceline.config import TorchDynamoPlugin

__all__ = [
    "cache_folder",
    "describe_cache",
    "known_seconds",
    "note_seconds",
    "open_cache",
    "size_of",
    "torch_cache_folder",
]

_LOG = get_logger(__name__)

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def cache_folder(settings: TorchDynamoPlugin, env: Mapping[str, str]) -> Path:
    """Say where compiled code is kept.

    Args:
        settings: Of the compiler.
        env: The environment variables.

    Returns:
        The configured folder, else torch's own variable, else `paceline/compiled` in the user's cache.
    """
    if settings.cache_dir is not None:
        return Path(settings.cache_dir).expanduser()
    if env.get(_VARIABLE):
        return Path(env[_VARIABLE])
    base = env.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "paceline" / "compiled"


def open_cache(settings: TorchDynamoPlugin, *, may_empty: bool) -> None:
    """Let torch keep compiled code in the folder, before anything is compiled.

    torch reads an environment variable, and sets it itself when it first compiles.

    Args:
        settings: Of the compiler.
        may_empty: Whether this process empties a folder that is too large; one on each machine does.
    """
    is_torchs = bool(os.environ.get(_VARIABLE)) and settings.cache_dir is None
    folder = cache_folder(settings, os.environ)
    if not is_torchs:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            _LOG.warning("Compiled code is kept in torch's folder for temporary files: %s", error)
            return
        os.environ[_VARIABLE] = str(folder)
    if may_empty and not is_torchs:
        _empty_if_large(folder, settings.cache_limit_gb)


def _empty_if_large(folder: Path, limit_gb: float) -> None:
    size = size_of(folder)
    if size <= limit_gb * 1e9:
        return
    _LOG.info("The cache of compiled code in %s is emptied: it has %.1f GB of %g", folder, size / 1e9, limit_gb)
    for entry in folder.iterdir():
        # Moved aside first, so that no other process finds half of it.
        aside = folder.with_name(f"{folder.name}.{os.getpid()}.{entry.name}")
        with suppress(OSError):
            entry.rename(aside)
            if aside.is_dir():
                shutil.rmtree(aside, ignore_errors=True)
            else:
                aside.unlink()


def size_of(folder: Path) -> int:
    """Add up the bytes of all files in a folder.

    Args:
        folder: It need not exist.

    Returns:
        The sum; what vanishes meanwhile is not in it.
    """
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(parent, name)).st_size  # noqa: PTH118
    return total


def describe_cache(settings: TorchDynamoPlugin, env: Mapping[str, str]) -> str:
    """Describe the folder in one line: where, how large, and when it is emptied.

    Args:
        settings: Of the compiler.
        env: The environment variables.

    Returns:
        The line.
    """
    folder = cache_folder(settings, env)
    is_torchs = bool(env.get(_VARIABLE)) and settings.cache_dir is None
    limit = f"never emptied: {_VARIABLE} names it" if is_torchs else f"emptied above {settings.cache_limit_gb:g} GB"
    return f"{folder} ({size_of(folder) / 1e9:.2f} GB, {limit}; to clear it, delete the folder)"


def torch_cache_folder() -> Path:
    """The folder that torch uses in this process."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def known_seconds(key: str) -> float | None:
    """How long compiling will take if an earlier run has left the code in the cache.

    Args:
        key: Names what is compiled.

    Returns:
        The seconds; None if no run has.
    """
    with suppress(OSError, ValueError, KeyError, ImportError):
        cold = float(json.loads(_note_of(key).read_text(encoding="utf-8"))["seconds"])
        # Tracing is done again, and kernels are loaded instead of compiled: measured as a quarter.
        return max(2.0, cold / 4)
    return None


def note_seconds(key: str, seconds: float) -> None:
    """Note how long compiling took, for later runs.

    Args:
        key: Names what was compiled.
        seconds: With an empty cache.
    """
    # Not at the top: the command describes the folder without importing torch.
    import torch

    with suppress(OSError, ImportError):
        path = _note_of(key)
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"seconds": round(seconds, 1), "torch": torch.__version__}), encoding="utf-8")


def _note_of(key: str) -> Path:
    """In the folder of what was compiled, to be deleted with it."""
    return torch_cache_folder() / "paceline" / f"{key}.json"
