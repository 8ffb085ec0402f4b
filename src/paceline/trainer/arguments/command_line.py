"""Dataclasses from a command line: one flag a field, with help, defaults and what was probably meant."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from paceline.errors import ConfigError, Problem, did_you_mean
from paceline.trainer.arguments.parsing import fields_of, is_flag, read_mapping, read_value

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["parse_arguments"]

_WHERE = "command line"


def parse_arguments(classes: Sequence[type[Any]], argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Make one object of each dataclass from flags, and from a file that flags override.

    Args:
        classes: Their fields must have different names.
        argv: `sys.argv[1:]` when None. A first word that ends in .json, .yaml or .yml, or `--config FILE`, names
            a file of values.

    Raises:
        ConfigError: Unknown flags or keys, or values that cannot be read; all at once.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    file = words.pop(0) if words and words[0].endswith((".json", ".yaml", ".yml")) else None
    parser = _parser(classes)
    given, rest = parser.parse_known_args(words)
    values = vars(given)
    file = values.pop("config", None) or file
    problems = [*_left_over(rest, words, classes)]
    said = {} if file is None else _from_file(file, classes, problems)
    said |= values
    read = {name: made for name, value in said.items() for made in _read(name, value, classes, problems)}
    if problems:
        raise ConfigError([*problems, *_contradictions(classes, read)])
    origins = {**dict.fromkeys(said, str(file)), **{name: f"--{name}" for name in values}}
    return tuple(_make(cls, read, origins) for cls in classes)


def _contradictions(classes: Sequence[type[Any]], read: Mapping[str, Any]) -> Iterator[Problem]:
    """What else is wrong with the values that could be read."""
    for cls in classes:
        try:
            _make(cls, read, dict.fromkeys(read, _WHERE))
        except ConfigError as error:
            yield from error.problems
        except TypeError:  # one without a default was left out
            continue


def _make(cls: type[Any], read: Mapping[str, Any], origins: Mapping[str, str]) -> Any:
    """One object of a class, which is told where its values came from if it wants to know."""
    known = fields_of(cls)
    own = {name: value for name, value in read.items() if name in known}
    made = cls(**own)
    if hasattr(made, "note_origins"):
        made.note_origins({name: origins[name] for name in own})
    return made


def _parser(classes: Sequence[type[Any]]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [FILE] [--name value ...]",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        # Long lists of choices would hide the text.
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36),
        epilog="Names may be written with - in place of _. --no_NAME says false.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file of values; flags override it.")
    for cls in classes:
        hints = fields_of(cls)
        for part, names in _parts(cls):
            about = (part.__doc__ or "").partition("\n")[0]
            title = cls.__name__ if part is cls else f"{cls.__name__}: {about[:1].lower()}{about[1:].rstrip('.')}"
            group = parser.add_argument_group(title)
            for made in dataclasses.fields(cls):
                if made.init and made.name in names:
                    _add(group, made, hints[made.name])
    return parser


def _parts(cls: type[Any]) -> Iterator[tuple[type[Any], set[str]]]:
    """The classes that a dataclass is made of, and the fields that each of them brings."""
    seen: set[str] = set()
    for part in reversed(cls.__mro__):
        names = set(getattr(part, "__dataclass_fields__", ())) - seen
        seen |= names
        if names:
            yield part, names


def _add(group: Any, made: dataclasses.Field[Any], hint: Any) -> None:
    text = str(made.metadata.get("help", "")).replace("%", "%%")
    default = made.default if made.default_factory is dataclasses.MISSING else made.default_factory()
    shown = "" if default in (dataclasses.MISSING, None) else f" (default {default})"
    names = [f"--{made.name}"]
    other = made.name.replace("_", "-")
    options: dict[str, Any] = {"dest": made.name, "help": f"{text}{shown}", "metavar": _metavar(hint)}
    if made.default is dataclasses.MISSING and made.default_factory is dataclasses.MISSING:
        options["required"] = True
        names = list(dict.fromkeys([*names, f"--{other}"]))
    if is_flag(hint) or made.metadata.get("const") is True:
        options |= {"nargs": "?", "const": True}
        group.add_argument(f"--no_{made.name}", dest=made.name, action="store_false", help=argparse.SUPPRESS)
    elif get_origin(hint) is list or any(get_origin(part) is list for part in get_args(hint)):
        options["nargs"] = "+"
    group.add_argument(*names, **options)
    if other != made.name and not options.get("required"):
        group.add_argument(f"--{other}", **{**options, "help": argparse.SUPPRESS})


def _metavar(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    return "true|false" if is_flag(hint) else "VALUE"


def _from_file(file: str, classes: Sequence[type[Any]], problems: list[Problem]) -> dict[str, Any]:
    try:
        found = read_mapping(file)
    except ValueError as error:
        problems.append(Problem(file, "", str(error)))
        return {}
    known = {name for cls in classes for name in fields_of(cls)}
    for name in found:
        if name not in known:
            problems.append(Problem(file, name, "unknown name", hint=_hint(name, classes)))
    return {name: value for name, value in found.items() if name in known}


def _read(name: str, value: Any, classes: Sequence[type[Any]], problems: list[Problem]) -> list[Any]:
    """The value as its field's type, alone in a list; an empty one if it cannot be that."""
    hint = next(fields_of(cls)[name] for cls in classes if name in fields_of(cls))
    try:
        return [read_value(hint, value)]
    except ValueError as error:
        problems.append(Problem(_WHERE, f"--{name}", str(error)))
        return []


def _left_over(rest: Sequence[str], words: Sequence[str], classes: Sequence[type[Any]]) -> Iterator[Problem]:
    """Unknown flags, and words that are the value of none."""
    values = {words[at + 1] for at, word in enumerate(words[:-1]) if word in rest and word.startswith("--")}
    for word in rest:
        if word.startswith("--"):
            yield _unknown_flag(word, classes)
        elif word not in values:
            yield Problem(_WHERE, word, "belongs to no flag")


def _unknown_flag(word: str, classes: Sequence[type[Any]]) -> Problem:
    name = word[2:].partition("=")[0].replace("-", "_")
    hint = _hint(name, classes)
    return Problem(_WHERE, word.partition("=")[0], "unknown flag", hint=hint)


def _hint(name: str, classes: Sequence[type[Any]]) -> str:
    """What to write in place of a name: as a class says of names that other versions have, else the closest."""
    said = [cls.ABSENT[name] for cls in classes if name in getattr(cls, "ABSENT", {})]
    return said[0] if said else did_you_mean(name, {known: None for cls in classes for known in fields_of(cls)})
