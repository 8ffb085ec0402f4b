"""Parsing of a command line into dataclasses: a flag for each field, with help, defaults and suggestions."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from paceline.errors import ConfigError, Problem, did_you_mean
from paceline.trainer.argument_errors import located
from paceline.trainer.arguments.parsing import default_of, fields_of, is_flag, read_file, read_value

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["parse_arguments"]

_WHERE = "command line"


def parse_arguments(classes: Sequence[type[Any]], argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Construct each dataclass from flags, and from a file that flags override.

    Args:
        classes: Dataclasses; no two fields may share a name.
        argv: The words of the command line; None takes `sys.argv[1:]`. A first word that ends in .json, .yaml or
            .yml, or `--config FILE`, names a file of values.

    Raises:
        ConfigError: Unknown flags or keys, or invalid values; all at once.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    file = None
    if words and words[0].endswith((".json", ".yaml", ".yml")):
        file = words.pop(0)
    parser = _parser(classes)
    given, rest = parser.parse_known_args(words)
    values = vars(given)
    file = values.pop("config", None) or file
    problems = [*_unused_words(rest, words, classes)]
    explicit, sources = _merge(file, values, classes, problems)
    parsed = {
        name: made for name, value in explicit.items() for made in _parsed(name, value, sources, classes, problems)
    }
    if problems:
        raise ConfigError([*problems, *_contradictions(classes, parsed, sources)])
    return tuple(_construct(cls, parsed, sources) for cls in classes)


def _merge(
    file: str | None, flags: Mapping[str, Any], classes: Sequence[type[Any]], problems: list[Problem]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of the file and of the flags, which override it, and where each was written."""
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if file is not None:
        values, sources = _from_file(file, classes, problems)
    kept = {key: where for key, where in sources.items() if key.partition(".")[0] not in flags}
    return values | dict(flags), kept | {name: f"--{name}" for name in flags}


def _contradictions(
    classes: Sequence[type[Any]], parsed: Mapping[str, Any], sources: Mapping[str, str]
) -> Iterator[Problem]:
    """Further problems with the values that could be parsed."""
    for cls in classes:
        try:
            _construct(cls, parsed, sources)
        except ConfigError as error:
            yield from error.problems
        except TypeError:  # a required field is missing
            continue


def _construct(cls: type[Any], parsed: Mapping[str, Any], sources: Mapping[str, str]) -> Any:
    """An instance of a class; where its values came from is recorded if the class can do that."""
    known = fields_of(cls)
    try:
        made = cls(**{name: value for name, value in parsed.items() if name in known})
    except ConfigError as error:
        raise ConfigError(located(error.problems, sources)) from None
    if hasattr(made, "note_origins"):
        made.note_origins({key: where for key, where in sources.items() if key.partition(".")[0] in known})
    return made


def _parser(classes: Sequence[type[Any]]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [FILE] [--name value ...]",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        # Choices would otherwise push the text far to the right.
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36),
        epilog="Names may be written with - instead of _. --no_NAME means false.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file of values; flags override it.")
    for cls in classes:
        hints = fields_of(cls)
        for base, names in _field_groups(cls):
            about = (base.__doc__ or "").partition("\n")[0]
            title = cls.__name__ if base is cls else f"{cls.__name__}: {about[:1].lower()}{about[1:].rstrip('.')}"
            group = parser.add_argument_group(title)
            for field in dataclasses.fields(cls):
                if field.init and field.name in names:
                    _add_flag(group, field, hints[field.name])
    return parser


def _field_groups(cls: type[Any]) -> Iterator[tuple[type[Any], set[str]]]:
    """The base classes of a dataclass that add fields, with the names of those."""
    seen: set[str] = set()
    for base in reversed(cls.__mro__):
        names = set(getattr(base, "__dataclass_fields__", ())) - seen
        seen |= names
        if names:
            yield base, names


def _add_flag(group: Any, field: dataclasses.Field[Any], hint: Any) -> None:
    default = default_of(field)
    is_required = default is dataclasses.MISSING
    text = str(field.metadata.get("help", "")).replace("%", "%%")
    shown = "" if is_required or default is None else f" (default {default})"
    options: dict[str, Any] = {"dest": field.name, "help": f"{text}{shown}", "metavar": _metavar(hint)}
    if is_flag(hint) or field.metadata.get("const") is True:
        options |= {"nargs": "?", "const": True}
        group.add_argument(f"--no_{field.name}", dest=field.name, action="store_false", help=argparse.SUPPRESS)
    elif get_origin(hint) is list or any(get_origin(part) is list for part in get_args(hint)):
        options["nargs"] = "+"
    name, dashed = f"--{field.name}", f"--{field.name.replace('_', '-')}"
    if is_required:
        group.add_argument(*dict.fromkeys([name, dashed]), required=True, **options)
        return
    group.add_argument(name, **options)
    if dashed != name:
        group.add_argument(dashed, **{**options, "help": argparse.SUPPRESS})


def _metavar(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if is_flag(hint):
        return "true|false"
    return "VALUE"


def _from_file(
    name: str, classes: Sequence[type[Any]], problems: list[Problem]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of a file, and where each was written."""
    file = read_file(name)
    problems.extend(file.problems)
    known = {name for cls in classes for name in fields_of(cls)}
    unknown = [name for name in file.values if name not in known]
    problems.extend(Problem(file.sources[name], name, "unknown name", hint=_hint(name, classes)) for name in unknown)
    return {name: value for name, value in file.values.items() if name in known}, file.sources


def _parsed(
    name: str, value: Any, sources: Mapping[str, str], classes: Sequence[type[Any]], problems: list[Problem]
) -> list[Any]:
    """A list with the value as its field's type; an empty one, and a problem, if it cannot be converted."""
    hint = next(fields_of(cls)[name] for cls in classes if name in fields_of(cls))
    try:
        return [read_value(hint, value)]
    except ValueError as error:
        problems.append(Problem(sources[name], name, str(error)))
        return []


def _unused_words(rest: Sequence[str], words: Sequence[str], classes: Sequence[type[Any]]) -> Iterator[Problem]:
    """Unknown flags, and words that are not the value of a flag."""
    values = {words[at + 1] for at, word in enumerate(words[:-1]) if word in rest and word.startswith("--")}
    for word in rest:
        if word.startswith("--"):
            yield _unknown_flag(word, classes)
        elif word not in values:
            yield Problem(_WHERE, word, "does not follow a flag")


def _unknown_flag(word: str, classes: Sequence[type[Any]]) -> Problem:
    name = word[2:].partition("=")[0].replace("-", "_")
    hint = _hint(name, classes)
    return Problem(_WHERE, word.partition("=")[0], "unknown flag", hint=hint)


def _hint(name: str, classes: Sequence[type[Any]]) -> str:
    """What to write instead of an unknown name: what a class says about it, else the closest name."""
    for cls in classes:
        if name in getattr(cls, "ABSENT", {}):
            return str(cls.ABSENT[name])
    return did_you_mean(name, [known for cls in classes for known in fields_of(cls)])
