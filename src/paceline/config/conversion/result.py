"""What a conversion comes to."""

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

__all__ = ["Conversion", "Fate"]


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of one key."""

    where: str
    key: str
    value: object
    became: str

    def __str__(self) -> str:
        shown = str(self.value).lower() if isinstance(self.value, bool) else str(self.value)
        return f"{self.where}: {self.key} {shown}: {self.became}".replace(f"{self.key} :", f"{self.key}:")


@dataclass(slots=True)
class Conversion:
    """A configuration made of something else.

    Attributes:
        source: What was converted, for the head of the new file.
        values: Dotted key to value.
        fates: One entry for each key of the source, in its order.
        problems: What could not be converted.
        command: The words of the `paceline launch` that does what a converted command did; None for a file.
        is_changed: Whether the source holds anything that is written differently now.
    """

    source: str
    values: dict[str, object] = field(default_factory=dict)
    fates: list[Fate] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    command: tuple[str, ...] | None = None
    is_changed: bool = False

    def put(self, where: str, key: str, value: object, dotted: str, new: object) -> None:
        """Set a value, and say under which key it is now."""
        self.values[dotted] = new
        became = "kept" if (key, value) == (dotted, new) else f"became {dotted} {_shown(new)}"
        self.is_changed |= became != "kept"
        self.fates.append(Fate(where, key, value, became))

    def leave_out(self, where: str, key: str, value: object, why: str) -> None:
        """Drop a key, and say why that changes nothing."""
        self.fates.append(Fate(where, key, value, f"left out: {why}"))

    def refuse(self, where: str, key: str, value: object, problem: Problem) -> None:
        """Say that a key cannot be converted."""
        reason = "; ".join(part for part in (problem.what, problem.why, problem.hint) if part)
        self.fates.append(Fate(where, key, value, f"NOT CONVERTED: {reason}"))
        self.problems.append(problem)

    def as_yaml(self, header: Sequence[str] = ()) -> str:
        """Write the new file."""
        return as_yaml(self.values, (f"Converted from {self.source}.", *header))

    def remaining_problems(self, folder: Path) -> Sequence[Problem]:
        """Check the new file as a launch would; paths in it count from `folder`."""
        place = folder if os.access(folder, os.W_OK) else None
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", dir=place, encoding="utf-8") as file:
            file.write(self.as_yaml())
            file.flush()
            try:
                resolve(flags={}, env={}, file=Path(file.name))
            except ConfigError as error:
                cut = f"{file.name}:"
                return [
                    Problem(*(part.replace(cut, "line ") for part in (p.where, p.key, p.what, p.why, p.hint)))
                    for p in error.problems
                ]
        return ()


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
