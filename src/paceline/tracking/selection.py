"""What `log_with` and `report_to` may say."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from paceline.config.schema.shapes import did_you_mean
from paceline.errors import ConfigError, Problem
from paceline.tracking.base import GeneralTracker, missing_parts
from paceline.tracking.registry import TRACKERS, load_backend

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["choose_trackers"]

_ALIASES = {"comet": "comet_ml", "json": "jsonl"}
_NONE = ("none", "")


def choose_trackers(
    asked: object, folder: Path | None, *, where: str = "Accelerator(…)", key: str = "log_with"
) -> list[str | GeneralTracker]:
    """Sort out which trackers were asked for; JSON lines are among them wherever there is a folder.

    Args:
        asked: A name, `all` for those that are installed, a tracker, a list of these, `none` or None.
        folder: Where trackers keep their files.
        where: Who asks, for errors.
        key: In which argument.

    Raises:
        ConfigError: Everything that is no tracker, or cannot do without a folder.
        MissingExtraError: A package is not installed.
    """
    problems: list[Problem] = []
    found: list[str | GeneralTracker] = []
    for one in _listed(asked):
        for choice in _read(one, folder, where, key, problems):
            if choice not in found:
                found.append(choice)
    if folder is not None and "jsonl" not in found:
        found.insert(0, "jsonl")
    problems.extend(_without_folder(found, folder, where, key))
    if problems:
        raise ConfigError(problems)
    for known in found:
        if isinstance(known, str):
            load_backend(known)
    return found


def _listed(asked: object) -> list[object]:
    if asked is None:
        return []
    is_list = isinstance(asked, Iterable) and not isinstance(asked, str | GeneralTracker)
    return list(asked) if is_list else [asked]  # type: ignore[call-overload]


def _read(
    one: object, folder: Path | None, where: str, key: str, problems: list[Problem]
) -> list[str | GeneralTracker]:
    """The trackers that one word or object stands for."""
    # An enumeration of names, as Accelerate has one, says its value.
    word = getattr(one, "value", one)
    if not isinstance(word, str):
        lacking = missing_parts(one)
        if lacking:
            what = f"a {type(one).__name__}, which lacks {', '.join(lacking)}"
            hint = "derive a class from paceline.tracking.GeneralTracker and give an object of it"
            problems.append(Problem(where, key, what, "it is no tracker", hint))
            return []
        return [one]  # type: ignore[list-item]
    name = _ALIASES.get(word.lower(), word.lower())
    if name in _NONE:
        return []
    if name == "all":
        return [known for known, entry in TRACKERS.items() if entry.is_installed and _fits(known, folder)]
    if name not in TRACKERS:
        hint = did_you_mean(name, TRACKERS) or f"the names are all, {', '.join(TRACKERS)}"
        problems.append(Problem(where, key, f"{word!r} is unknown", hint=hint))
        return []
    return [name]


def _fits(name: str, folder: Path | None) -> bool:
    return folder is not None or not TRACKERS[name].backend.requires_logging_directory


def _without_folder(found: list[str | GeneralTracker], folder: Path | None, where: str, key: str) -> Iterable[Problem]:
    if folder is not None:
        return
    for one in found:
        tracker = TRACKERS[one].backend if isinstance(one, str) else one
        if tracker.requires_logging_directory:
            hint = "give project_dir, or ProjectConfiguration(logging_dir=...)"
            yield Problem(where, key, f"{tracker.name} without a folder", "it keeps its files there", hint)
