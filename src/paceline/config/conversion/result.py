"""The result of a conversion: the new values, and what became of each key."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.config.resolution import resolve
from paceline.config.sources.writing import as_yaml
from paceline.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Conversion", "ConvertedKey"]


@dataclass(frozen=True, slots=True)
class ConvertedKey:
    """What became of one key of the source.

    Attributes:
        where: Its place, for example `old.yaml:12`.
        key: The key as written.
        value: The value as written.
        became: The new key and value, or why there is none.
    """

    where: str
    key: str
    value: object
    became: str

    def __str__(self) -> str:
        shown = str(self.value).lower() if isinstance(self.value, bool) else str(self.value)
        return f"{self.where}: {self.key} {shown}: {self.became}".replace(f"{self.key} :", f"{self.key}:")


@dataclass(slots=True)
class Conversion:
    """A configuration converted from another format.

    Attributes:
        source: What was converted, for the head of the new file.
        values: The new configuration: dotted key to value.
        keys: One entry for each key of the source, in its order.
        problems: What could not be converted.
        command: The `paceline launch` that replaces a converted command line; None for a file.
        is_changed: Whether any key of the source is written differently now.
    """

    source: str
    values: dict[str, object] = field(default_factory=dict)
    keys: list[ConvertedKey] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    command: tuple[str, ...] | None = None
    is_changed: bool = False

    def put(self, where: str, key: str, value: object, dotted: str, new: object) -> None:
        """Set a value, and record its new key."""
        self.values[dotted] = new
        became = "kept"
        if (key, value) != (dotted, new):
            became = f"became {dotted} {_shown(new)}"
        self.is_changed |= became != "kept"
        self.keys.append(ConvertedKey(where, key, value, became))

    def leave_out(self, where: str, key: str, value: object, why: str) -> None:
        """Drop a key, and record why that changes nothing."""
        self.keys.append(ConvertedKey(where, key, value, f"left out: {why}"))

    def refuse(self, where: str, key: str, value: object, problem: Problem) -> None:
        """Record that a key cannot be converted; the problem says why."""
        self.keys.append(ConvertedKey(where, key, value, "NOT CONVERTED"))
        self.problems.append(problem)

    def as_yaml(self, header: Sequence[str] = ()) -> str:
        """Return the text of the new file."""
        return as_yaml(self.values, (f"Converted from {self.source}.", *header))

    def remaining_problems(self, folder: Path) -> Sequence[Problem]:
        """Check the new file as a launch would; relative paths in it start at `folder`."""
        parent = None
        if os.access(folder, os.W_OK):
            parent = folder
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", dir=parent, encoding="utf-8") as file:
            file.write(self.as_yaml())
            file.flush()
            try:
                resolve(flags={}, env={}, file=Path(file.name))
            except ConfigError as error:
                return [_with_lines(problem, file.name) for problem in error.problems]
        return ()


def _with_lines(problem: Problem, name: str) -> Problem:
    """Write `line 3` in the place of `/tmp/x.yaml:3`: the file is gone when the problem is read."""
    parts = (problem.where, problem.key, problem.what, problem.why, problem.hint)
    return Problem(*(part.replace(f"{name}:", "line ") for part in parts))


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return str(value)
