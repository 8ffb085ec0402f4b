"""Checks values against the types of fields, and describes these types as JSON Schema.

Types are strict: a number in quotes is text, and a whole number is no truth value.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Union, get_args, get_origin

from paceline.config.schema.fields import AfterValidator, BeforeValidator, Declaration, WithJsonSchema

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Check", "Rejected", "check_of"]

_COMPARE: Final = {"ge": operator.ge, "gt": operator.gt, "le": operator.le, "lt": operator.lt}
_WORDS: Final = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
_KEYWORDS: Final = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
_TYPE_NAMES: Final = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}


class Rejected(Exception):
    """A value does not fit.

    Args:
        limits: The bounds that a number of the right type misses.
        reason: What a converter says is wrong with a value.
    """

    def __init__(self, limits: str = "", reason: str = "") -> None:
        super().__init__(limits or reason)
        self.limits = limits
        self.reason = reason


class Check(ABC):
    """Checks values of one type."""

    @abstractmethod
    def read(self, value: Any) -> Any:
        """Return the value as the field keeps it.

        Raises:
            Rejected: It does not fit.
        """

    @abstractmethod
    def schema(self) -> dict[str, Any]:
        """Return the JSON Schema of the type."""


class _Anything(Check):
    def read(self, value: Any) -> Any:
        return value

    def schema(self) -> dict[str, Any]:
        return {}


class _Function(Check):
    def read(self, value: Any) -> Any:
        if not callable(value):
            raise Rejected
        return value

    def schema(self) -> dict[str, Any]:
        return {}


class _Instance(Check):
    def __init__(self, kind: type) -> None:
        self._kind = kind

    def read(self, value: Any) -> Any:
        if not isinstance(value, self._kind) or (self._kind is int and isinstance(value, bool)):
            raise Rejected
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": _TYPE_NAMES.get(self._kind, "object")}


class _Float(Check):
    def read(self, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value - value != 0:
            raise Rejected
        return float(value)

    def schema(self) -> dict[str, Any]:
        return {"type": "number"}


class _Choice(Check):
    def __init__(self, choices: Sequence[Any]) -> None:
        self._choices = choices

    def read(self, value: Any) -> Any:
        for choice in self._choices:
            # 1 equals True; a member of an enumeration of strings is its value.
            is_same_kind = isinstance(value, bool) is isinstance(choice, bool)
            if choice == value and is_same_kind and isinstance(value, type(choice)):
                return choice
        raise Rejected

    def schema(self) -> dict[str, Any]:
        kind = {"type": _TYPE_NAMES[type(self._choices[0])]}
        if len(self._choices) == 1:
            return {"const": self._choices[0], **kind}
        return {"enum": list(self._choices), **kind}


class _Items(Check):
    """A tuple of any length."""

    def __init__(self, item: Check) -> None:
        self._item = item

    def read(self, value: Any) -> Any:
        if not isinstance(value, tuple):
            raise Rejected
        return tuple(self._item.read(part) for part in value)

    def schema(self) -> dict[str, Any]:
        return {"type": "array", "items": self._item.schema()}


class _Row(Check):
    """A tuple with a type for each place."""

    def __init__(self, items: Sequence[Check]) -> None:
        self._items = items

    def read(self, value: Any) -> Any:
        if not isinstance(value, tuple) or len(value) != len(self._items):
            raise Rejected
        return tuple(item.read(part) for item, part in zip(self._items, value, strict=True))

    def schema(self) -> dict[str, Any]:
        count = len(self._items)
        parts = [item.schema() for item in self._items]
        return {"type": "array", "minItems": count, "maxItems": count, "prefixItems": parts}


class _Mapping(Check):
    def __init__(self, value: Check) -> None:
        self._value = value

    def read(self, value: Any) -> Any:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise Rejected
        return {key: self._value.read(part) for key, part in value.items()}

    def schema(self) -> dict[str, Any]:
        return {"type": "object", "additionalProperties": self._value.schema() or True}


class _Either(Check):
    """The first of several types that fits; where none does, the first one says why."""

    def __init__(self, parts: Sequence[Check]) -> None:
        self._parts = parts

    def read(self, value: Any) -> Any:
        first: Rejected | None = None
        for part in self._parts:
            try:
                return part.read(value)
            except Rejected as rejected:
                first = first or rejected
        raise first or Rejected

    def schema(self) -> dict[str, Any]:
        return {"anyOf": [part.schema() for part in self._parts]}


class _Bounded(Check):
    def __init__(self, inner: Check, bounds: Mapping[str, float]) -> None:
        self._inner = inner
        self._bounds = bounds

    def read(self, value: Any) -> Any:
        value = self._inner.read(value)
        if not all(_COMPARE[name](value, bound) for name, bound in self._bounds.items()):
            raise Rejected(limits=" and ".join(f"{_WORDS[name]} {bound}" for name, bound in self._bounds.items()))
        return value

    def schema(self) -> dict[str, Any]:
        return {**self._inner.schema(), **{_KEYWORDS[name]: bound for name, bound in self._bounds.items()}}


class _Converted(Check):
    def __init__(self, inner: Check, before: Callable[[Any], Any] | None, after: Callable[[Any], Any] | None) -> None:
        self._inner = inner
        self._before = before
        self._after = after

    def read(self, value: Any) -> Any:
        try:
            if self._before is not None:
                value = self._before(value)
            value = self._inner.read(value)
            return value if self._after is None else self._after(value)
        except ValueError as error:
            raise Rejected(reason=str(error)) from error

    def schema(self) -> dict[str, Any]:
        return self._inner.schema()


class _Described(Check):
    def __init__(self, inner: Check, schema: Mapping[str, Any]) -> None:
        self._inner = inner
        self._schema = schema

    def read(self, value: Any) -> Any:
        return self._inner.read(value)

    def schema(self) -> dict[str, Any]:
        return dict(self._schema)


def check_of(annotation: Any) -> Check:
    """Build the check of a type.

    Args:
        annotation: A type, a `Literal`, a union, a tuple or dict of types, or one of these with what is annotated.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        check = check_of(arguments[0])
        for item in arguments[1:]:
            check = _with_metadata(check, item)
        return check
    if origin in (Union, UnionType):
        return _Either([check_of(part) for part in arguments])
    if origin is Literal:
        return _Choice(arguments)
    if origin is tuple:
        return _tuple_check(arguments)
    if origin is dict:
        return _Mapping(check_of(arguments[1]))
    if origin is Callable:
        return _Function()
    if annotation is Any:
        return _Anything()
    return _Float() if annotation is float else _Instance(annotation)


def _tuple_check(arguments: tuple[Any, ...]) -> Check:
    if arguments[1:] == (...,):
        return _Items(check_of(arguments[0]))
    return _Row([check_of(part) for part in arguments])


def _with_metadata(check: Check, item: object) -> Check:
    match item:
        case Declaration():
            return _Bounded(check, item.bounds)
        case BeforeValidator():
            return _Converted(check, item.convert, None)
        case AfterValidator():
            return _Converted(check, None, item.convert)
        case WithJsonSchema():
            return _Described(check, item.schema)
    return check
