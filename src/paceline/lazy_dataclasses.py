"""Data classes that cost next to nothing to define: their methods are generated when the first one is needed.

`dataclasses.dataclass` compiles up to seven functions for each class while a module is imported, about half a
millisecond. A program uses few of the classes that it imports.
"""

from __future__ import annotations

import dataclasses
from threading import RLock
from typing import TYPE_CHECKING, Any

__all__ = ["lazy_dataclass"]

if TYPE_CHECKING:
    from dataclasses import dataclass as lazy_dataclass
else:

    def lazy_dataclass(
        *, frozen: bool = False, slots: bool = False, kw_only: bool = False, eq: bool = True, order: bool = False
    ) -> Any:
        """Make a class a data class; it behaves as under `dataclasses.dataclass` of the same arguments.

        Args:
            frozen: Refuse assignments.
            slots: Keep the fields in slots, without a `__dict__`.
            kw_only: All fields are keyword arguments.
            eq: Compare by value.
            order: Order by value.

        Returns:
            The decorator.
        """
        options = {"frozen": frozen, "kw_only": kw_only, "eq": eq, "order": order}

        def decorate(declared: type) -> type:
            pending = _Pending(declared, options)
            return pending.with_slots() if slots else pending.in_place()

        return decorate


# Attributes of data classes that are read from the class.
_DESCRIPTIONS = ("__dataclass_fields__", "__dataclass_params__", "__match_args__")
_LOCK = RLock()


class _Pending:
    """A class whose methods are not generated yet.

    Args:
        declared: The class as it was written.
        options: What is generated.
    """

    def __init__(self, declared: type, options: dict[str, bool]) -> None:
        self._declared = declared
        self._options = options
        # The class that gets the methods.
        self._made = declared
        self._missing = {name for name in _generated(options) if name not in vars(declared)}

    def with_slots(self) -> type:
        """Return a class with slots that stands for the one as it was written."""
        declared = self._declared
        names = [name for name, kind in declared.__annotations__.items() if not _is_class_variable(kind)]
        left_out = {*names, "__dict__", "__weakref__"}
        namespace = {key: value for key, value in vars(declared).items() if key not in left_out}
        namespace.update(self._stand_ins())
        if self._options["frozen"]:
            namespace.update(__getstate__=_values, __setstate__=_set_values)
        self._made = type(declared)(declared.__name__, declared.__bases__, {**namespace, "__slots__": tuple(names)})
        self._made.__qualname__ = declared.__qualname__
        return self._made

    def in_place(self) -> type:
        """Return the class as it was written."""
        for name, value in self._stand_ins().items():
            setattr(self._declared, name, value)
        return self._declared

    def _stand_ins(self) -> dict[str, Any]:
        names: dict[str, Any] = {name: _FirstUse(self, name) for name in self._missing}
        if self._options["eq"] and not self._options["frozen"] and "__hash__" not in vars(self._declared):
            names["__hash__"] = None
        if self._options["frozen"]:
            names.update(__setattr__=_refuse_assignment, __delattr__=_refuse_assignment)
        return names

    def find(self, name: str) -> Any:
        """Generate the methods, once, and return one of them."""
        with _LOCK:
            if name in self._missing:
                self._generate(name)
        return vars(self._made)[name]

    def _generate(self, name: str) -> None:
        if self._made is self._declared:
            self._generate_in_place()
        elif name == "__init__":
            # Most objects are never compared or printed.
            self._adopt({"__init__"}, {**self._options, "repr": False, "eq": False, "order": False})
        else:
            self._adopt(set(self._missing), self._options)

    def _adopt(self, names: set[str], options: dict[str, bool]) -> None:
        """Take these methods from a copy of the class."""
        declared = self._declared
        namespace = {key: value for key, value in vars(declared).items() if key not in ("__dict__", "__weakref__")}
        copied = type(declared)(declared.__name__, declared.__bases__, namespace)
        dataclasses.dataclass(**options)(copied)  # type: ignore[call-overload]
        for name in names:
            setattr(self._made, name, vars(copied)[name])
        self._missing -= names

    def _generate_in_place(self) -> None:
        # What is there already would be taken for the class's own.
        stand_ins = {*self._missing, *(("__setattr__", "__delattr__") if self._options["frozen"] else ())}
        self._missing = set()
        for name in stand_ins:
            delattr(self._declared, name)
        dataclasses.dataclass(**self._options)(self._declared)  # type: ignore[call-overload]


class _FirstUse:
    """Stands for a method or attribute of a class, until somebody asks for it."""

    def __init__(self, pending: _Pending, name: str) -> None:
        self._pending = pending
        self._name = name

    def __get__(self, instance: object, owner: type) -> Any:
        found = self._pending.find(self._name)
        return found.__get__(instance, owner) if hasattr(found, "__get__") else found


def _generated(options: dict[str, bool]) -> list[str]:
    """The methods and attributes that `dataclasses.dataclass` makes."""
    names = ["__init__", "__repr__", *_DESCRIPTIONS]
    if options["eq"]:
        names.append("__eq__")
    if options["eq"] and options["frozen"]:
        names.append("__hash__")
    if options["order"]:
        names += ["__lt__", "__le__", "__gt__", "__ge__"]
    return names


def _is_class_variable(annotation: object) -> bool:
    return str(annotation).startswith(("ClassVar", "typing.ClassVar"))


def _refuse_assignment(self: object, name: str, *_value: object) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")


def _values(self: Any) -> list[Any]:
    return [getattr(self, field.name) for field in dataclasses.fields(self)]


def _set_values(self: Any, values: list[Any]) -> None:
    for field, value in zip(dataclasses.fields(self), values, strict=True):
        object.__setattr__(self, field.name, value)
