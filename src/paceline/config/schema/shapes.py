"""Which values a field accepts, and how text of a file, flag or variable is converted to them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Union, get_args, get_origin

from paceline.errors import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pydantic.fields import FieldInfo

Style = Literal["native", "plain", "quoted", "text"]
"""How a value was written: a Python or YAML value, an unquoted or quoted YAML scalar, or a bare string of a
flag or variable."""

TRUE_WORDS: Final = frozenset({"true", "yes", "on", "1"})
FALSE_WORDS: Final = frozenset({"false", "no", "off", "0"})
_INTEGRAL: Final = re.compile(r"[+-]?\d+(_\d+)*")
_NAMES: Final = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


@dataclass(frozen=True, slots=True)
class Shape:
    """The types and choices that a field accepts.

    Attributes:
        types: The plain types accepted, without None.
        choices: The allowed values of a `Literal`, empty for other fields.
        nullable: Whether None is a value of the field.
    """

    types: frozenset[type]
    choices: tuple[object, ...]
    nullable: bool

    @classmethod
    def of(cls, field: FieldInfo) -> Shape:
        """Read the shape from a pydantic field's annotation."""
        types: set[type] = set()
        choices: list[object] = []
        for part in _parts(field.annotation):
            if isinstance(part, type):
                types.add(part)
            else:
                choices.extend(part)
        return cls(frozenset(types - {type(None)}), tuple(choices), type(None) in types)

    @property
    def kind(self) -> Literal["bool", "int", "float", "str", "choice"]:
        """The kind of command-line option."""
        if self.choices and not self.types:
            return "choice"
        if self.choices:
            return "str"
        if self.types == {bool}:
            return "bool"
        if self.types and self.types <= {int, float}:
            return "float" if float in self.types else "int"
        return "str"

    @property
    def allowed(self) -> str:
        """Everything that the field accepts, as a phrase."""
        names = [_NAMES[kind] for kind in (bool, int, float, str) if kind in self.types]
        if tuple in self.types or list in self.types:
            names.append("a list or comma-separated text")
        if dict in self.types:
            names.append("a mapping")
        if self.choices:
            shown = ", ".join(str(choice) for choice in self.choices)
            if len(self.choices) > 1:
                shown = f"one of {shown}"
            names.append(shown)
        return " or ".join(names) or "nothing"

    def suggestion(self, value: object) -> str:
        """Return a hint with the choice closest to a wrong value, or an empty string."""
        return did_you_mean(str(value), [str(choice) for choice in self.choices])

    def read(self, value: object, style: Style = "native", text: str | None = None) -> object:
        """Convert a value to the types of this shape where that is unambiguous.

        Args:
            value: The value of the source.
            style: How the source wrote it.
            text: The scalar as written in the file, since YAML reads an unquoted `no` as False.

        Returns:
            The converted value; the same value where it does not fit.
        """
        chosen = self._choice(value, text)
        if chosen is not None:
            return chosen
        if style == "text" and self.nullable and str(value).casefold() in {"none", "null"}:
            return None
        if isinstance(value, str):
            return self._from_text(value, style)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            # YAML 1.1 takes 2:4 for a number to the base of 60.
            if text is not None and ":" in text and str in self.types:
                return text
            return self._number(value)
        return value

    def _choice(self, value: object, text: str | None) -> object | None:
        names = {str(choice).casefold(): choice for choice in self.choices}
        if isinstance(value, bool) and bool in self.types:
            return None
        if isinstance(value, Enum):
            candidates = [str(value.value), value.name]
        elif isinstance(value, (str, int)):
            candidates = [text if text is not None else str(value)]
        else:
            return None
        return next((names[c.casefold()] for c in candidates if c.casefold() in names), None)

    def _from_text(self, value: str, style: Style) -> object:
        if style == "native":
            return value
        word = value.strip().casefold()
        if bool in self.types and word in TRUE_WORDS | FALSE_WORDS and not (int in self.types and word in {"0", "1"}):
            return word in TRUE_WORDS
        if style != "quoted" and (int in self.types or float in self.types):
            number = _maybe_number(word)
            if number is None:
                return value
            return self._number(number)
        return value

    def _number(self, value: int | float) -> object:
        if int in self.types and float(value).is_integer():
            return int(value)
        if float in self.types:
            return float(value)
        return value


def _parts(annotation: Any) -> Iterable[type | tuple[object, ...]]:
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _parts(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for part in get_args(annotation):
            yield from _parts(part)
    elif origin is Literal:
        yield get_args(annotation)
    elif isinstance(origin, type):
        yield origin
    elif isinstance(annotation, type):
        yield annotation


def _maybe_number(word: str) -> int | float | None:
    if _INTEGRAL.fullmatch(word):
        return int(word)
    try:
        number = float(word)
    except ValueError:
        return None
    if number == number and abs(number) != float("inf"):
        return number
    return None
