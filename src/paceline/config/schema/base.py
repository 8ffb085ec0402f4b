"""The base class of all sections, and the names under which their fields are set."""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, get_args, get_origin

from paceline.config.schema.checking import Rejected, check_of
from paceline.config.schema.fields import Declaration, FieldInfo
from paceline.config.schema.shapes import Shape
from paceline.errors import ConfigError, Problem, did_you_mean
from paceline.lazy_dataclasses import lazy_dataclass

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from typing_extensions import Self

    from paceline.config.schema.checking import Check

_CONTAINERS: Final[Mapping[type, str]] = {list: "list", tuple: "list", dict: "mapping"}


@lazy_dataclass(frozen=True, slots=True)
class Key:
    """The names of a field outside Python.

    Attributes:
        name: The YAML key; empty for the section's prefix and the field's name.
        aliases: Other spellings in files.
        flag: The command-line flag; empty for the YAML key.
        has_flag: Whether there is a flag and a variable; mappings can only be written in a file.
        more_choices: Choices of the flag that are translated before they reach the field.
        labels: Choices with their meaning, which questions, editors and the reference page show.
    """

    name: str = ""
    aliases: tuple[str, ...] = ()
    flag: str = ""
    has_flag: bool = True
    more_choices: tuple[str, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()


@lazy_dataclass(frozen=True, slots=True)
class Fault:
    """A wrong value of one field; `field` is a Python name."""

    field: str
    what: str
    why: str = ""
    hint: str = ""


@lazy_dataclass(frozen=True, slots=True)
class Setting:
    """One field of a section, with all its names."""

    field: str
    key: str
    aliases: tuple[str, ...]
    flag: str
    has_flag: bool
    more_choices: tuple[str, ...]
    labels: tuple[tuple[str, str], ...]
    shape: Shape
    info: FieldInfo

    @property
    def description(self) -> str:
        """One sentence on what the field does."""
        return self.info.declaration.description

    @property
    def default(self) -> Any:
        """The default of the field."""
        return self.info.declaration.make_default()


class Section:
    """A frozen group of settings; a wrong name or value raises `ConfigError` with all problems.

    Fields are annotated and declared with `Field(...)`. Their types are read when the first value is checked.

    Attributes:
        key_prefix: The prefix of the section's YAML keys; keys without it are accepted too.
        declarations: What is declared for each field.
        fields_set: The names of the fields that were given, rather than taking their default.
    """

    key_prefix: ClassVar[str] = ""
    declarations: ClassVar[dict[str, Declaration]] = {}
    fields_set: frozenset[str]

    def __init_subclass__(cls) -> None:
        own = {name: value for name, value in vars(cls).items() if isinstance(value, Declaration)}
        cls.declarations = {**cls.declarations, **own}

    def __init__(self, **values: Any) -> None:
        folded, faults = self.fold(values)
        read, wrong = _checked(type(self), {field: self._read(field, value) for field, value in folded.items()})
        faults = [*faults, *wrong]
        if not wrong:
            self._fill(read)
            faults = [*faults, *self.clashes()]
        if faults:
            where = f"{type(self).__name__}(…)"
            raise ConfigError(Problem(where, f.field, f.what, f.why, f.hint) for f in faults)

    def _fill(self, values: Mapping[str, Any]) -> None:
        """Set the given values, and defaults for the rest."""
        # Not by assignment, which is an error.
        fields = vars(self)
        for name, declaration in self.declarations.items():
            fields[name] = values[name] if name in values else declaration.make_default()
        fields["fields_set"] = frozenset(values)

    def __setattr__(self, name: str, value: Any) -> None:
        section = type(self).__name__
        raise ConfigError(
            [
                Problem(
                    f"{section}(…)",
                    name,
                    f"was set to {value!r} on an existing {section}",
                    "a configuration is immutable",
                    f"pass the value to the constructor: {section}({name}={value!r})",
                )
            ]
        )

    def __delattr__(self, name: str) -> None:
        self.__setattr__(name, None)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        fields = vars(self)
        return ((name, fields[name]) for name in self.declarations)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return dict(self) == dict(other)

    def __hash__(self) -> int:
        return hash((type(self), tuple(self)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self)})"

    @classmethod
    def build(cls, values: Mapping[str, Any]) -> tuple[Self, list[Fault]]:
        """Build a section from the valid values.

        Args:
            values: Python name to value.

        Returns:
            The section, and what is wrong with the other values. Contradictions are looked for only when every
            single value is valid.
        """
        read, faults = _checked(cls, values)
        made = cls.__new__(cls)
        made._fill(read)
        return made, faults or list(made.clashes())

    def given(self) -> dict[str, Any]:
        """Return the fields that were given, with those of inner sections as dicts."""
        return {
            name: value.given() if isinstance(value, Section) else value
            for name, value in self
            if name in self.fields_set
        }

    @classmethod
    def fold(cls, values: dict[str, Any]) -> tuple[dict[str, Any], list[Fault]]:
        """Convert arguments of Python callers to fields; a hook, the base class changes nothing.

        Args:
            values: The arguments by name.

        Returns:
            The fields by name, and what is wrong with the arguments.
        """
        return values, []

    def clashes(self) -> Iterator[Fault]:
        """Yield the fields whose values contradict each other."""
        yield from ()

    def changed(self, **values: Any) -> Self:
        """Return a copy with some fields replaced.

        Args:
            **values: The new values by Python name.

        Returns:
            A new section, checked like any other.

        Raises:
            ConfigError: A value is wrong, or contradicts another.
        """
        made = type(self)(**{**dict(self), **values})
        vars(made)["fields_set"] = self.fields_set | values.keys()
        return made

    @classmethod
    def _read(cls, field: str, value: Any) -> Any:
        setting = settings_by_field(cls).get(field)
        if setting is None:
            return value
        return setting.shape.read(value)


@cache
def settings_of(section: type[Section]) -> tuple[Setting, ...]:
    """List the fields of a section with their keys, flags and shapes."""
    return tuple(_setting(section, name, info) for name, info in field_infos(section).items())


@cache
def settings_by_field(section: type[Section]) -> dict[str, Setting]:
    """Map a Python name to its setting."""
    return {setting.field: setting for setting in settings_of(section)}


@cache
def settings_by_name(section: type[Section]) -> dict[str, Setting]:
    """Map every spelling that a file may use to its setting."""
    names: dict[str, Setting] = {}
    for setting in settings_of(section):
        for name in (setting.key, *setting.aliases):
            names.setdefault(name, setting)
            names.setdefault(name.removeprefix(section.key_prefix), setting)
    return names


@cache
def field_infos(section: type[Section]) -> dict[str, FieldInfo]:
    """Map the name of each field to its type and its declaration."""
    infos = {}
    for name, declaration in section.declarations.items():
        annotation, metadata = _annotation(section, name), ()
        if get_origin(annotation) is Annotated:
            annotation, *metadata = get_args(annotation)
        infos[name] = FieldInfo(annotation, tuple(metadata), declaration)
    return infos


def _annotation(section: type[Section], field: str) -> Any:
    """Evaluate the annotation of a field in its module; `typing.get_type_hints` takes ten times as long."""
    home = next(cls for cls in section.__mro__ if field in cls.__annotations__)
    return eval(home.__annotations__[field], vars(sys.modules[home.__module__]))


@cache
def field_check(section: type[Section], field: str) -> Check:
    """Return the check of a field's values."""
    info = field_infos(section)[field]
    if info.metadata:
        return check_of(Annotated[(info.annotation, *info.metadata)])  # type: ignore[return-value]
    return check_of(info.annotation)


def _setting(section: type[Section], name: str, info: FieldInfo) -> Setting:
    key = next((item for item in info.metadata if isinstance(item, Key)), Key())
    yaml_key = key.name or (name if name.startswith(section.key_prefix) else section.key_prefix + name)
    flag = key.flag or yaml_key
    shape = Shape.of(info.annotation)
    return Setting(name, yaml_key, key.aliases, flag, key.has_flag, key.more_choices, key.labels, shape, info)


def _checked(section: type[Section], values: Mapping[str, Any]) -> tuple[dict[str, Any], list[Fault]]:
    """Split values into those that fit, as the fields keep them, and what is wrong with the others."""
    good: dict[str, Any] = {}
    faults: list[Fault] = []
    for field, value in values.items():
        if field not in section.declarations:
            known = settings_by_field(section)
            faults.append(Fault(field, "unknown name", hint=did_you_mean(field, known) or _listed(known)))
            continue
        try:
            good[field] = field_check(section, field).read(value)
        except Rejected as rejected:
            faults.append(_value_fault(settings_by_field(section)[field], value, rejected))
    return good, faults


def value_fault(setting: Setting, value: object) -> Fault:
    """Report a value of a wrong type or outside of the choices, with what is allowed."""
    hint = ""
    if isinstance(value, str):
        hint = setting.shape.suggestion(value)
    if not hint and isinstance(value, str) and setting.shape.read(value, "text") != value:
        hint = "remove the quotes"
    allowed = setting.shape.allowed
    if setting.more_choices:
        allowed = f"one of {', '.join((*setting.more_choices, *map(str, setting.shape.choices)))}"
    return Fault(setting.field, f"{shown(value)} is not allowed", f"it must be {allowed}", hint)


def shown(value: object) -> str:
    """Write a value with its type: the text '2', the number 2, the boolean true."""
    if isinstance(value, str):
        return f"the text {value!r}"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, (int, float)):
        return f"the number {value!r}"
    if value is None:
        return "null"
    return f"the {_CONTAINERS.get(type(value), type(value).__name__)} {value!r}"


def _value_fault(setting: Setting, value: object, rejected: Rejected) -> Fault:
    if rejected.reason:
        return Fault(setting.field, f"{shown(value)} cannot be used", rejected.reason)
    if rejected.limits:
        return Fault(setting.field, f"{shown(value)} is out of range", f"it must be {rejected.limits}")
    return value_fault(setting, value)


def _listed(known: Mapping[str, Setting]) -> str:
    return f"the names are {', '.join(known)}"
