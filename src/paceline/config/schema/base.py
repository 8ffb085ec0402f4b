"""The base class of all sections, and the names under which their fields are set."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Final, get_args

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict, ValidationError

from paceline.config.schema.shapes import Shape
from paceline.errors import ConfigError, Problem, counted, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pydantic.fields import FieldInfo
    from typing_extensions import Self

_LIMITS: Final = frozenset({"greater_than", "greater_than_equal", "less_than", "less_than_equal"})
_CONTAINERS: Final[Mapping[type, str]] = {list: "list", tuple: "list", dict: "mapping"}


@dataclass(frozen=True, slots=True)
class Key:
    """The names of a field outside Python.

    Attributes:
        name: The YAML key; empty for the section's prefix and the field's name.
        aliases: Other spellings in files.
        flag: The command-line flag; empty for the YAML key.
        has_flag: Whether there is a flag and a variable; mappings can only be written in a file.
        more_choices: Choices of the flag that are translated before they reach the field.
        labels: Choices with their meaning, which questions, editors and the reference page show.
        counts: What a number counts, in the singular.
        unit: What a number is measured in.
    """

    name: str = ""
    aliases: tuple[str, ...] = ()
    flag: str = ""
    has_flag: bool = True
    more_choices: tuple[str, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    counts: str = ""
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Fault:
    """A wrong value of one field; `field` is a Python name."""

    field: str
    what: str
    why: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of a section, with all its names."""

    field: str
    key: str
    aliases: tuple[str, ...]
    flag: str
    has_flag: bool
    more_choices: tuple[str, ...]
    labels: tuple[tuple[str, str], ...]
    counts: str
    unit: str
    shape: Shape
    info: FieldInfo

    @property
    def description(self) -> str:
        """One sentence on what the field does."""
        return self.info.description or ""

    @property
    def default(self) -> Any:
        """The default of the field."""
        return self.info.get_default(call_default_factory=True)

    def with_unit(self, value: object) -> str:
        """Write a value; a number with what it counts or measures."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return str(value)
        if self.counts:
            return counted(int(value), self.counts)
        return f"{value:g} {self.unit}" if self.unit else str(value)


class Section(BaseModel):
    """A frozen group of settings; a wrong name or value raises `ConfigError` with all problems.

    Attributes:
        key_prefix: The prefix of the section's YAML keys; keys without it are accepted too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    key_prefix: ClassVar[str] = ""

    def __init__(self, **values: Any) -> None:
        folded, faults = self.fold(values)
        read = {field: self._read(field, value) for field, value in folded.items()}
        try:
            self.__pydantic_validator__.validate_python(read, self_instance=self)
        except ValidationError as error:
            faults = [*faults, *faults_of(type(self), error, in_python=True)]
        else:
            faults = [*faults, *self.clashes()]
        if faults:
            where = f"{type(self).__name__}(…)"
            raise ConfigError(Problem(where, f.field, f.what, f.why, f.hint) for f in faults)

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

    @classmethod
    def build(cls, values: Mapping[str, Any]) -> tuple[Self, list[Fault]]:
        """Build a section from the valid values.

        Args:
            values: Python name to value.

        Returns:
            The section, and what is wrong with the other values. Contradictions are looked for only when every
            single value is valid.
        """
        made = cls.__new__(cls)
        try:
            cls.__pydantic_validator__.validate_python(dict(values), self_instance=made)
        except ValidationError as error:
            faults = list(faults_of(cls, error))
            bad = {fault.field for fault in faults}
            good = {field: value for field, value in values.items() if field not in bad}
            return cls.build(good)[0], faults
        return made, list(made.clashes())

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
        return type(self)(**{**dict(self), **values})

    @classmethod
    def _read(cls, field: str, value: Any) -> Any:
        setting = settings_by_field(cls).get(field)
        if setting is None:
            return value
        return setting.shape.read(value)


@cache
def settings_of(section: type[Section]) -> tuple[Setting, ...]:
    """List the fields of a section with their keys, flags and shapes."""
    return tuple(_setting(section, name, info) for name, info in section.model_fields.items())


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


def _setting(section: type[Section], name: str, info: FieldInfo) -> Setting:
    key = next((item for item in info.metadata if isinstance(item, Key)), Key())
    yaml_key = key.name or (name if name.startswith(section.key_prefix) else section.key_prefix + name)
    flag = key.flag or yaml_key
    return Setting(
        field=name,
        key=yaml_key,
        aliases=key.aliases,
        flag=flag,
        has_flag=key.has_flag,
        more_choices=key.more_choices,
        labels=key.labels,
        counts=key.counts,
        unit=key.unit,
        shape=Shape.of(info),
        info=info,
    )


def faults_of(section: type[Section], error: ValidationError, *, in_python: bool = False) -> Iterator[Fault]:
    """Translate the errors of pydantic, one for each field.

    Args:
        section: The section.
        error: The errors.
        in_python: Whether the values are those of a constructor, where nothing is translated.
    """
    seen: set[str] = set()
    known = settings_by_field(section)
    for item in error.errors(include_url=False):
        field = ""
        if item["loc"]:
            field = str(item["loc"][0])
        if field in seen:
            continue
        seen.add(field)
        if field not in known:
            yield Fault(field, "unknown name", hint=did_you_mean(field, known) or _listed(known))
        else:
            reason = str(item.get("ctx", {}).get("error", ""))
            yield _value_fault(known[field], item["type"], item["input"], reason, in_python=in_python)


def value_fault(setting: Setting, value: object, *, in_python: bool = False) -> Fault:
    """Report a value of a wrong type or outside of the choices, with what is allowed.

    Args:
        setting: The setting.
        value: The wrong value.
        in_python: Whether it was given to a constructor, where nothing is translated.
    """
    hint = ""
    if isinstance(value, str):
        hint = setting.shape.suggestion(value)
    if not hint and isinstance(value, str) and setting.shape.read(value, "text") != value:
        hint = "remove the quotes"
    allowed = setting.shape.allowed
    if setting.more_choices and not in_python:
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


def _value_fault(setting: Setting, kind: str, value: object, reason: str, *, in_python: bool) -> Fault:
    if kind == "value_error":
        return Fault(setting.field, f"{shown(value)} cannot be used", reason)
    if kind in _LIMITS:
        return Fault(setting.field, f"{shown(value)} is out of range", f"it must be {_limits(setting.info)}")
    return value_fault(setting, value, in_python=in_python)


def _limits(info: FieldInfo) -> str:
    words = []
    for item in (*info.metadata, *_nested_metadata(info.annotation)):
        match item:
            case Ge(ge=bound):
                words.append(f"at least {bound}")
            case Gt(gt=bound):
                words.append(f"more than {bound}")
            case Le(le=bound):
                words.append(f"at most {bound}")
            case Lt(lt=bound):
                words.append(f"less than {bound}")
    return " and ".join(words)


def _nested_metadata(annotation: Any) -> Iterator[object]:
    """Yield what is annotated on the parts of a union."""
    for part in get_args(annotation):
        for item in getattr(part, "__metadata__", ()):
            yield from getattr(item, "metadata", ())


def _listed(known: Mapping[str, Setting]) -> str:
    return f"the names are {', '.join(known)}"
