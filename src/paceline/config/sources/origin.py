"""Where a value comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from paceline.config.schema.shapes import Style

Kind = Literal["argument", "flag", "environment", "file", "detected", "default"]


@dataclass(frozen=True, slots=True)
class Origin:
    """The source of one value.

    Attributes:
        kind: The kind of source.
        where: The place in it: `--zero_stage`, `PACELINE_DEBUG`, `config.yaml:12`.
    """

    kind: Kind
    where: str

    @property
    def is_explicit(self) -> bool:
        """Whether the value was set, rather than detected or a default."""
        return self.kind not in ("detected", "default")


DEFAULT = Origin("default", "default")


@dataclass(frozen=True, slots=True)
class Detected:
    """A detected value with its source.

    Attributes:
        value: The value; None for one that could not be detected.
        where: The source, such as `Slurm (SLURM_NODEID)`.
    """

    value: object
    where: str


@dataclass(frozen=True, slots=True)
class Raw:
    """A value as a source gave it, before it is checked."""

    value: object
    origin: Origin
    style: Style = "native"
    text: str | None = None

    def __str__(self) -> str:
        """Return the value as it was written."""
        if self.text is not None:
            return self.text
        if isinstance(self.value, bool):
            return str(self.value).lower()
        return str(self.value)
