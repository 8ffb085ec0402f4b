"""The selection of trackers by `log_with` and `report_to`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from paceline.errors import ConfigError, Problem, did_you_mean
from paceline.tracking.base import GeneralTracker, missing_parts
from paceline.tracking.registry import TRACKERS, load_backend

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["choose_trackers"]

_ALIASES = {"comet": "comet_ml", "json": "jsonl"}
_NONE = ("none", "")


def choose_trackers(
    requested: object, folder: Path | None, *, where: str = "Accelerator(…)", key: str = "log_with"
) -> list[str | GeneralTracker]:
    """Return the requested trackers; JSON lines are added wherever there is a folder.

    Args:
        requested: A name, `all` for those that are installed, a tracker, a list of these, `none` or None.
        folder: Where trackers write their files.
        where: Where the request comes from, for errors.
        key: The argument, for errors.

    Returns:
        Names of known trackers, and the user's own tracker objects.

    Raises:
        ConfigError: Lists everything that is not a tracker, or that requires a folder.
        MissingExtraError: A package is not installed.
    """
    problems: list[Problem] = []
    trackers: list[str | GeneralTracker] = []
    for item in _as_list(requested):
        trackers.extend(one for one in _read(item, folder, where, key, problems) if one not in trackers)
    if folder is not None and "jsonl" not in trackers:
        trackers.insert(0, "jsonl")
    problems.extend(_without_folder(trackers, folder, where, key))
    if problems:
        raise ConfigError(problems)
    for known in trackers:
        if isinstance(known, str):
            load_backend(known)
    return trackers


def _as_list(requested: object) -> list[object]:
    if requested is None:
        return []
    is_list = isinstance(requested, Iterable) and not isinstance(requested, str | GeneralTracker)
    return list(requested) if is_list else [requested]  # type: ignore[call-overload]


def _read(
    item: object, folder: Path | None, where: str, key: str, problems: list[Problem]
) -> list[str | GeneralTracker]:
    """The trackers that one name or object stands for."""
    # Accelerate has an enumeration of the names.
    word = getattr(item, "value", item)
    if not isinstance(word, str):
        missing = missing_parts(item)
        if missing:
            what = f"a {type(item).__name__} is not a tracker: it lacks {', '.join(missing)}"
            hint = "derive a class from paceline.tracking.GeneralTracker and pass an instance"
            problems.append(Problem(where, key, what, "", hint))
            return []
        return [item]  # type: ignore[list-item]
    name = _ALIASES.get(word.lower(), word.lower())
    if name in _NONE:
        return []
    if name == "all":
        return [known for known, entry in TRACKERS.items() if entry.is_installed and _fits(known, folder)]
    if name not in TRACKERS:
        hint = did_you_mean(name, TRACKERS) or f"choose among all, {', '.join(TRACKERS)}"
        problems.append(Problem(where, key, f"{word!r} is unknown", hint=hint))
        return []
    return [name]


def _fits(name: str, folder: Path | None) -> bool:
    return folder is not None or not TRACKERS[name].backend.requires_logging_directory


def _without_folder(
    trackers: list[str | GeneralTracker], folder: Path | None, where: str, key: str
) -> Iterable[Problem]:
    if folder is not None:
        return
    for one in trackers:
        tracker = TRACKERS[one].backend if isinstance(one, str) else one
        if tracker.requires_logging_directory:
            hint = "pass project_dir, or ProjectConfiguration(logging_dir=...)"
            yield Problem(where, key, f"{tracker.name} needs a folder", "it writes its files there", hint)
