"""The base of every part of the configuration, and what a field knows about its YAML key."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Final, get_args

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict, ValidationError

from paceline.config.schema.shapes import Shape
from paceline.errors import ConfigError, Problem, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pydantic.fields import FieldInfo
    from typing_extensions import Self

_LIMITS: Final = frozenset({"greater_than", "greater_than_equal", "less_than", "less_than_equal"})
_CONTAINERS: Final[Mapping[type, str]] = {list: "list", tuple: "list", dict: "mapping"}


@dataclass(frozen=True, slots=True)
class Key:
    """How a field is called outside Python.

    Attributes:
        name: The YAML key; empty when it is the section's prefix and the field's name.
        aliases: Other spellings that files carry.
        flag: The command-line flag; empty when it is the YAML key.
        has_flag: Whether there is a flag and a variable at all; mappings can only be written in a file.
        more_choices: Choices of the flag that are translated before the field sees them.
        labels: What single choices mean, as pairs; questions, editors and the reference page show it.
    """

    name: str = ""
    aliases: tuple[str, ...] = ()
    flag: str = ""
    has_flag: bool = True
    more_choices: tuple[str, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Fault:
    """One field that cannot be what it was set to; `field` is a Python name."""

    field: str
    what: str
    why: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Slot:
    """One field of a section with all its names."""

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
        """One sentence on what the field decides."""
        return self.info.description or ""

    @property
    def default(self) -> Any:
        """The value that the field has when nobody sets it."""
        return self.info.get_default(call_default_factory=True)


class Section(BaseModel):
    """A frozen group of settings; a wrong name or value raises `ConfigError` with all problems.

    Attributes:
        key_prefix: What the YAML keys of the section begin with; keys without it are accepted too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    key_prefix: ClassVar[str] = ""

    def __init__(self, **values: Any) -> None:
        folded, faults = self.fold(values)
        read = {field: self._read(field, value) for field, value in folded.items()}
        try:
            self.__pydantic_validator__.validate_python(read, self_instance=self)
        except ValidationError as error:
            faults = [*faults, *faults_of(type(self), error)]
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
                    f"was set to {value!r} after it was made",
                    "who reads a configuration relies on it not changing",
                    f"give the value when it is made: {section}({name}={value!r})",
                )
            ]
        )

    @classmethod
    def build(cls, values: Mapping[str, Any]) -> tuple[Self, list[Fault]]:
        """Make a section of the values that are good, and say what is wrong with the others.

        Contradictions are only looked for when every single value is good.
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
        """Turn inputs that Python callers may use into fields; the base takes them as they are."""
        return values, []

    def clashes(self) -> Iterator[Fault]:
        """Yield the fields whose values contradict each other."""
        yield from ()

    def changed(self, **values: Any) -> Self:
        """Return a copy with some fields replaced, checked like a new one."""
        return type(self)(**{**dict(self), **values})

    @classmethod
    def _read(cls, field: str, value: Any) -> Any:
        slot = slots_by_field(cls).get(field)
        return value if slot is None else slot.shape.read(value)


@cache
def slots(section: type[Section]) -> tuple[Slot, ...]:
    """List the fields of a section with their keys, flags and shapes."""
    return tuple(_slot(section, name, info) for name, info in section.model_fields.items())


@cache
def slots_by_field(section: type[Section]) -> dict[str, Slot]:
    """Map a Python name to its slot."""
    return {slot.field: slot for slot in slots(section)}


@cache
def slots_by_name(section: type[Section]) -> dict[str, Slot]:
    """Map every spelling that a file may use to its slot."""
    names: dict[str, Slot] = {}
    for slot in slots(section):
        for name in (slot.key, *slot.aliases):
            names.setdefault(name, slot)
            names.setdefault(name.removeprefix(section.key_prefix), slot)
    return names


def _slot(section: type[Section], name: str, info: FieldInfo) -> Slot:
    key = next((item for item in info.metadata if isinstance(item, Key)), Key())
    yaml_key = key.name or (name if name.startswith(section.key_prefix) else section.key_prefix + name)
    flag = key.flag or yaml_key
    return Slot(name, yaml_key, key.aliases, flag, key.has_flag, key.more_choices, key.labels, Shape.of(info), info)


def faults_of(section: type[Section], error: ValidationError) -> Iterator[Fault]:
    """Translate pydantic's findings, one for each field."""
    seen: set[str] = set()
    known = slots_by_field(section)
    for item in error.errors(include_url=False):
        field = str(item["loc"][0]) if item["loc"] else ""
        if field in seen:
            continue
        seen.add(field)
        if field not in known:
            yield Fault(field, "unknown name", hint=did_you_mean(field, known) or _listed(known))
        else:
            yield _value_fault(known[field], item["type"], item["input"], str(item.get("ctx", {}).get("error", "")))


def value_fault(slot: Slot, value: object) -> Fault:
    """Say that a value is of the wrong type or not among the choices, and what is allowed."""
    hint = slot.shape.suggestion(value) if isinstance(value, str) else ""
    if not hint and isinstance(value, str) and slot.shape.read(value, "text") != value:
        hint = "remove the quotes"
    allowed = slot.shape.allowed
    if slot.more_choices:
        allowed = f"one of {', '.join((*slot.more_choices, *map(str, slot.shape.choices)))}"
    return Fault(slot.field, f"{shown(value)} is not allowed", f"it must be {allowed}", hint)


def shown(value: object) -> str:
    """Write a value so that text, numbers and booleans cannot be taken for each other."""
    if isinstance(value, str):
        return f"the text {value!r}"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, (int, float)):
        return f"the number {value!r}"
    if value is None:
        return "null"
    return f"the {_CONTAINERS.get(type(value), type(value).__name__)} {value!r}"


def _value_fault(slot: Slot, kind: str, value: object, reason: str) -> Fault:
    if kind == "value_error":
        return Fault(slot.field, f"{shown(value)} cannot be used", reason)
    if kind in _LIMITS:
        return Fault(slot.field, f"{shown(value)} is out of range", f"it must be {_limits(slot.info)}")
    return value_fault(slot, value)


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


def _listed(known: Mapping[str, Slot]) -> str:
    return f"the names are {', '.join(known)}"
