"""The checkpoints of a project: which there are, and which of them are complete."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.checkpoint.folder import LEFTOVER, Checkpoint, number_of, open_checkpoint, subfolders
from paceline.checkpoint.format.manifest import MANIFEST
from paceline.environment.logging import get_logger
from paceline.errors import DamagedCheckpointError

if TYPE_CHECKING:
    import os
    from pathlib import Path

__all__ = ["Found", "find_checkpoints", "find_foreign", "newest_checkpoint"]

_LOG = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Found:
    """A folder that is a checkpoint, or was to become one.

    Attributes:
        folder: Where it is.
        checkpoint: The whole checkpoint, or None.
        problem: Why it is not whole; empty if it is.
    """

    folder: Path
    checkpoint: Checkpoint | None
    problem: str = ""


def find_checkpoints(folder: str | os.PathLike[str]) -> list[Found]:
    """The checkpoints in a folder, newest first; what is not a checkpoint of ours is left out.

    Args:
        folder: A project's folder, or the `checkpoints` folder in it.
    """
    found = [entry for path in subfolders(folder) if (entry := _look(path)) is not None]
    return sorted(found, key=_age, reverse=True)


def find_foreign(folder: str | os.PathLike[str]) -> list[Path]:
    """Training states of other libraries among the numbered checkpoints in a project's folder, newest first."""
    numbered = [(number, path) for path in subfolders(folder) if (number := number_of(path)) is not None]
    return [path for _, path in sorted(numbered, reverse=True) if _is_foreign(path)]


def newest_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint | None:
    """The newest whole checkpoint of a project; a line is logged for each newer one that is not whole."""
    for found in find_checkpoints(folder):
        if found.checkpoint is not None:
            return found.checkpoint
        _LOG.warning("skipped %s: %s", found.folder.name, found.problem)
    return None


def _is_foreign(path: Path) -> bool:
    """Whether it is a training state of another library; weights alone may be what is left of one of ours."""
    from paceline.checkpoint.foreign import recognise

    return recognise(path) not in (None, "weights")


def _look(path: Path) -> Found | None:
    if LEFTOVER.fullmatch(path.name) or not ((path / MANIFEST).exists() or number_of(path) is not None):
        return None
    if _is_foreign(path):
        return None
    try:
        return Found(path, open_checkpoint(path))
    except DamagedCheckpointError as error:
        return Found(path, None, str(error))


def _age(found: Found) -> tuple[int, str]:
    number = number_of(found.folder)
    created = found.checkpoint.manifest.created if found.checkpoint else ""
    return (-1 if number is None else number), created
