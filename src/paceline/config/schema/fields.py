"""How sections declare their fields: default, description, bounds, and converters of values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["AfterValidator", "BeforeValidator", "Declaration", "Field", "FieldInfo", "WithJsonSchema"]

_MISSING: Final = object()


class BeforeValidator:
    """In an annotation: converts a value before its type is checked; a ValueError says what is wrong with it."""

    __slots__ = ("convert",)

    def __init__(self, convert: Callable[[Any], Any]) -> None:
        self.convert = convert


class AfterValidator:
    """In an annotation: converts or refuses a value of the right type; a ValueError says what is wrong with it."""

    __slots__ = ("convert",)

    def __init__(self, convert: Callable[[Any], Any]) -> None:
        self.convert = convert


class WithJsonSchema:
    """In an annotation: what the JSON schema says instead of what follows from the type."""

    __slots__ = ("schema",)

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self.schema = schema


class Declaration:
    """What `Field(...)` says: of a field of a section, or, in an annotation, the bounds of a number."""

    __slots__ = ("bounds", "default", "default_factory", "description")

    def __init__(
        self,
        default: Any,
        default_factory: Callable[[], Any] | None,
        description: str,
        bounds: Mapping[str, float],
    ) -> None:
        self.default = default
        self.default_factory = default_factory
        self.description = description
        self.bounds = bounds

    def make_default(self) -> Any:
        """Return the value of a field that is not given."""
        if self.default_factory is not None:
            return self.default_factory()
        return self.default


class FieldInfo(NamedTuple):
    """One field of a section.

    Attributes:
        annotation: Its type.
        metadata: What is annotated on the type.
        declaration: Its default and description.
    """

    annotation: Any
    metadata: tuple[object, ...]
    declaration: Declaration


def Field(  # noqa: N802  (reads like the class that it declares)
    default: Any = _MISSING,
    *,
    default_factory: Callable[[], Any] | None = None,
    description: str = "",
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """Declare a field of a section, or bounds in an annotation.

    Args:
        default: The value of a field that is not given.
        default_factory: Makes that value, where it is mutable.
        description: One sentence on what the field does.
        ge: The least value of a number.
        gt: A bound that a number must exceed.
        le: The largest value of a number.
        lt: A bound that a number must stay below.

    Returns:
        A `Declaration`, which type checkers take for a value of the field.
    """
    bounds = {name: value for name, value in (("ge", ge), ("gt", gt), ("le", le), ("lt", lt)) if value is not None}
    return Declaration(default, default_factory, description, bounds)
