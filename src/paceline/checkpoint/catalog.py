"""The checkpoints of a project: which exist, and which of them are complete."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.checkpoint.folder import LEFTOVER, Checkpoint, number_of, numbered_subfolders, open_checkpoint, subfolders
from paceline.checkpoint.format.manifest import MANIFEST
from paceline.environment.logging import get_logger
from paceline.errors import DamagedCheckpointError, PacelineError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["CatalogEntry", "find_checkpoints", "find_foreign", "is_foreign_state", "newest_checkpoint", "what_is_wrong"]

_LOG = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A folder that holds a checkpoint, or what is left of one.

    Attributes:
        folder: Its path.
        checkpoint: The checkpoint; None if it is incomplete.
        problem: Why it is incomplete; empty if it is not.
    """

    folder: Path
    checkpoint: Checkpoint | None
    problem: str = ""


def find_checkpoints(folder: str | os.PathLike[str]) -> list[CatalogEntry]:
    """The checkpoints in a folder, newest first. Those of other libraries are left out.

    Args:
        folder: A project folder, or the `checkpoints` folder in it.

    Returns:
        Complete and incomplete ones.
    """
    entries = [_entry(path) for path in subfolders(folder)]
    return sorted((entry for entry in entries if entry is not None), key=_age, reverse=True)


def find_foreign(folder: str | os.PathLike[str]) -> list[Path]:
    """Training states of other libraries among the numbered checkpoints of a project folder, newest first."""
    return [path for _, path in sorted(numbered_subfolders(folder), reverse=True) if is_foreign_state(path)]


def newest_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint | None:
    """The newest complete checkpoint of a project, or None; logs a warning for each newer one that is incomplete."""
    for entry in find_checkpoints(folder):
        if entry.checkpoint is not None:
            return entry.checkpoint
        _LOG.warning("skipped %s: %s", entry.folder.name, entry.problem)
    return None


def is_foreign_state(path: Path) -> bool:
    """Whether a folder holds a training state of another library.

    A folder with nothing but weights is not one: it may be a paceline checkpoint that lost its other files.
    """
    # Imports torch.distributed.checkpoint, which takes a second.
    from paceline.checkpoint.foreign import detect_format

    return detect_format(path) not in (None, "weights")


def what_is_wrong(error: PacelineError, folder: Path) -> str:
    """Return the message of an error that opening or reading a folder raised, without naming the folder again."""
    cause = error.__cause__ if isinstance(error.__cause__, PacelineError) else error
    return str(cause).removeprefix(f"{os.path.realpath(folder)} ")


def _entry(path: Path) -> CatalogEntry | None:
    if LEFTOVER.fullmatch(path.name) or not ((path / MANIFEST).exists() or number_of(path) is not None):
        return None
    if is_foreign_state(path):
        return None
    try:
        return CatalogEntry(path, open_checkpoint(path))
    except DamagedCheckpointError as error:
        return CatalogEntry(path, None, what_is_wrong(error, path))


def _age(entry: CatalogEntry) -> tuple[int, str]:
    number = number_of(entry.folder)
    created = entry.checkpoint.manifest.created if entry.checkpoint else ""
    return (-1 if number is None else number), created
