"""Parsing of argument values: from Python, from command-line text, from YAML and JSON files."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from paceline.config.schema.shapes import FALSE_WORDS, TRUE_WORDS
from paceline.config.sources.document import read_document
from paceline.errors import did_you_mean
from paceline.trainer.argument_errors import field_error

if TYPE_CHECKING:
    from collections.abc import Mapping

    from paceline.errors import Problem

__all__ = ["FileValues", "default_of", "fields_of", "is_flag", "read_file", "read_mapping", "read_value", "read_window"]


def fields_of(cls: type[Any]) -> Mapping[str, Any]:
    """The constructor fields of a dataclass, with their types."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a field; `dataclasses.MISSING` if it is required."""
    if field.default_factory is dataclasses.MISSING:
        return field.default
    return field.default_factory()


def is_flag(hint: Any) -> bool:
    """Whether a field is boolean."""
    return bool in _parts(hint)


def read_value(hint: Any, value: Any) -> Any:
    """Convert a value to the type of its field; numbers may be text, because YAML reads `1e-4` as text.

    Raises:
        ValueError: It cannot be converted; the message lists what is allowed.
    """
    if isinstance(value, Enum):
        value = value.value
    parts = _parts(hint)
    if value is None:
        if NoneType in parts:
            return None
        raise ValueError("null is not allowed")
    for part in parts:
        if get_origin(part) is Literal:
            return _choice(get_args(part), value)
        if part is bool:
            return _boolean(value)
        if part is int:
            return _integer(value)
        if part is float:
            return _number(value)
        if get_origin(part) is list:
            return _listed(value)
    if parts[0] is str and isinstance(value, Path):
        return str(value)
    return value


def _parts(hint: Any) -> tuple[Any, ...]:
    is_union = get_origin(hint) not in (None, list, dict, Literal)
    if is_union:
        return get_args(hint)
    return (hint,)


def _choice(choices: tuple[Any, ...], value: Any) -> Any:
    if value is False and "no" in choices:  # YAML reads `no` as false
        return "no"
    if value in choices:
        return value
    hint = did_you_mean(str(value), [str(choice) for choice in choices])
    allowed = ", ".join(map(str, choices))
    raise ValueError(f"{value!r} is not one of {allowed}" + (f"; {hint}" if hint else ""))


def _boolean(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() in TRUE_WORDS | FALSE_WORDS:
        return str(value).lower() in TRUE_WORDS
    raise ValueError(f"{value!r} is neither true nor false")


def _integer(value: Any) -> int:
    if isinstance(value, bool):
        raise ValueError(f"{value!r} is not a whole number")
    number = _number(value)
    if number != int(number):
        raise ValueError(f"{value!r} is not a whole number")
    return int(number)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is not a number")
    if isinstance(value, int):
        return value
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{value!r} is not a number") from None


def _listed(value: Any) -> Any:
    if isinstance(value, str):
        return [word for word in value.replace(",", " ").split() if word]
    if isinstance(value, tuple | set):
        return list(value)
    return value


def read_mapping(value: dict[str, Any] | str) -> dict[str, Any]:
    """Read a mapping from a dict, JSON text, or the path of a JSON or YAML file.

    Raises:
        ValueError: The file does not exist, cannot be read, or does not contain a mapping.
    """
    if isinstance(value, dict):
        return dict(value)
    text, name = value, "the text"
    if not value.lstrip().startswith("{"):
        path = Path(value).expanduser()
        if not path.is_file():
            raise ValueError(f"no such file: {value}")
        if path.suffix != ".json":
            return _mapping_in_yaml(path)
        text, name = path.read_text(encoding="utf-8"), str(path)
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} cannot be parsed: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{name} contains a {type(parsed).__name__}, not a mapping")
    return parsed


def _mapping_in_yaml(path: Path) -> dict[str, Any]:
    """Read it as every file of values is read: 1e-6 is a number, a key that is written twice an error."""
    file = read_file(str(path))
    if file.problems:
        raise ValueError(f"{path} cannot be read: {file.problems[0]}")
    return dict(file.values)


@dataclass(frozen=True, slots=True)
class FileValues:
    """What a file of values holds.

    Attributes:
        values: The values by name.
        sources: The line of each name, and of each key inside a value, such as `run.yaml:3`.
        problems: What cannot be read.
    """

    values: dict[str, Any]
    sources: dict[str, str]
    problems: list[Problem]


def read_file(name: str) -> FileValues:
    """Read a YAML or JSON file of values, with their lines."""
    path = Path(name).expanduser()
    items, problems = read_document(path)
    values = {item.name: item.value for item in items}
    if path.suffix == ".json" and not problems:
        # YAML reads a character beyond U+FFFF, which JSON writes as two, in another way.
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    sources = {item.name: item.where for item in items}
    inner = {f"{item.name}.{key.name}": key.where for item in items for key in item.items or ()}
    return FileValues(values, sources | inner, problems)


def read_window(text: str) -> tuple[int, int]:
    """The first and last step of `first:last`, or of a single number, counted from 1.

    Raises:
        ConfigError: It is neither.
    """
    first, _, last = text.partition(":")
    try:
        window = int(first), int(last or first)
    except ValueError:
        window = (0, 0)
    if not 1 <= window[0] <= window[1]:
        what = f"{text!r} is not a range of steps"
        raise field_error("profile_steps", what, hint="write first:last, counted from 1")
    return window
