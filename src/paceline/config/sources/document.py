"""Reads a YAML or JSON file into keys and values that keep their lines."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import yaml

from paceline.errors import Problem

if TYPE_CHECKING:
    from pathlib import Path

    from paceline.config.schema.shapes import Style

_LONGEST_QUOTE: Final = 80
_SYNTAX_ADVICE: Final = {
    "mapping values are not allowed": "check the indentation of this line, or quote a value that holds `: `",
    "'\\t'": "indent with spaces",
    "another document": "keep one document: remove the line `---` and one of the two parts",
    "cannot start any token": "quote the value",
}
"""The usual fix of a syntax error, by a part of its text."""


@dataclass(frozen=True, slots=True)
class Item:
    """One key of a mapping in a file.

    Attributes:
        name: The key as written.
        where: `config.yaml:12`.
        value: The value in Python's types.
        style: Whether a scalar was quoted.
        text: A scalar as written; None for lists and mappings.
        items: The keys of a mapping; None for anything else.
    """

    name: str
    where: str
    value: object
    style: Style
    text: str | None
    items: tuple[Item, ...] | None


class _Loader(yaml.SafeLoader):
    """Reads `1e-5` as a number, as YAML 1.2 does; PyYAML wants `1.0e-5`."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$"), [*"-+0123456789"]
)


def read_document(path: Path) -> tuple[tuple[Item, ...], list[Problem]]:
    """Read a file whose top level is a mapping; what cannot be read is among the problems."""
    text, problems = _read_text(path)
    if text is None:
        return (), problems
    if text.lstrip().startswith("{"):
        text = text.replace("\t", " ")  # JSON may be indented with tabs, which YAML refuses
    try:
        loader = _Loader(_without_bom(text))
        return _top_level(loader, loader.get_single_node(), path)
    except yaml.YAMLError as error:
        return (), [_syntax_problem(path, error, text)]
    except RecursionError:
        return (), [Problem(str(path), "", "the file is nested too deeply")]
    except ValueError as error:
        return (), [Problem(str(path), "", "a value cannot be read", str(error), "correct or quote it")]


def _read_text(path: Path) -> tuple[str | None, list[Problem]]:
    where = str(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        what, hint = "there is no such file", "correct the path"
        return None, [Problem(where, "", what, hint=hint)]
    except IsADirectoryError:
        return None, [Problem(where, "", "this is a folder", "a configuration is one file", "name the file in it")]
    except OSError as error:
        return None, [Problem(where, "", f"the file cannot be read: {error.strerror or error}")]
    try:
        return data.decode("utf-8"), []
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        what = f"byte 0x{data[error.start]:02x} is not UTF-8"
        return None, [Problem(f"{where}:{line}", "", what, hint="save the file as UTF-8")]


def _without_bom(text: str) -> str:
    return text.removeprefix("\ufeff")


def _top_level(loader: _Loader, node: yaml.Node | None, path: Path) -> tuple[tuple[Item, ...], list[Problem]]:
    if node is None or (isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"):
        hint = "write the settings into it, or leave the file out"
        return (), [Problem(f"{path}:1", "", "the file is empty", "it must hold keys and values", hint)]
    if not isinstance(node, yaml.MappingNode):
        kind = "a single value"
        if isinstance(node, yaml.SequenceNode):
            kind = "a list"
        hint = "write one `key: value` on each line"
        return (), [Problem(_where(path, node), "", f"the file holds {kind}", "its top level must be a mapping", hint)]
    problems: list[Problem] = []
    items = _mapping(loader, node, path, "", problems)
    return items, problems


def _mapping(
    loader: _Loader, node: yaml.MappingNode, path: Path, prefix: str, problems: list[Problem]
) -> tuple[Item, ...]:
    first_lines = _duplicates(node, path, prefix, problems)
    loader.flatten_mapping(node)  # `<<` merges: merged keys come first, the mapping's own keys override them
    items: dict[str, Item] = {}
    for key, value in node.value:
        name = _key_name(key)
        if name in items and first_lines.get(name) == _where(path, key):
            pass  # the mapping's own key after a merged one
        elif name in items:
            continue
        items[name] = _item(loader, name, _where(path, key), value, path, prefix, problems)
    return tuple(items.values())


def _duplicates(node: yaml.MappingNode, path: Path, prefix: str, problems: list[Problem]) -> dict[str, str]:
    """Report keys that are twice in one mapping; return where each key comes first."""
    first: dict[str, str] = {}
    for key, _ in node.value:
        name, where = _key_name(key), _where(path, key)
        if name != "<<" and name in first:
            why = f"its first value is at {first[name]}"
            problems.append(Problem(where, f"{prefix}{name}", "the key is given twice", why, "remove one"))
        first.setdefault(name, where)
    return first


def _item(
    loader: _Loader,
    name: str,
    where: str,
    node: yaml.Node,
    path: Path,
    prefix: str,
    problems: list[Problem],
) -> Item:
    if isinstance(node, yaml.MappingNode):
        if prefix:
            return Item(name, where, loader.construct_object(node, deep=True), "plain", None, ())
        items = _mapping(loader, node, path, f"{name}.", problems)
        return Item(name, where, {item.name: item.value for item in items}, "plain", None, items)
    if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:timestamp":
        node.tag = "tag:yaml.org,2002:str"  # no setting is a date
    value = loader.construct_object(node, deep=True)
    if isinstance(node, yaml.ScalarNode):
        style: Style = "plain" if node.style is None else "quoted"
        return Item(name, where, value, style, node.value, None)
    return Item(name, where, value, "plain", None, None)


def _key_name(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return str(node.value)
    return f"({node.tag.rpartition(':')[2]})"


def _where(path: Path, node: yaml.Node) -> str:
    return f"{path}:{node.start_mark.line + 1}"


def _syntax_problem(path: Path, error: yaml.YAMLError, text: str) -> Problem:
    if path.suffix == ".json":
        try:
            json.loads(text)
        except json.JSONDecodeError as broken:
            return Problem(f"{path}:{broken.lineno}", "", f"this is not valid JSON: {describe_json_error(broken)}")
    if isinstance(error, yaml.MarkedYAMLError):
        return _marked_problem(path, error, text)
    position = getattr(error, "position", 0)
    line = text.count("\n", 0, position) + 1
    what = f"character #x{getattr(error, 'character', 0):04x} is not allowed in YAML"
    return Problem(f"{path}:{line}", "", f"{what}, in {_quoted_line(text, line)}", hint="remove it")


def _marked_problem(path: Path, error: yaml.MarkedYAMLError, text: str) -> Problem:
    """Locate a YAML error; what is never closed is reported where it opens, not at the end of the file."""
    mark = error.problem_mark or error.context_mark
    what = f"this is not valid YAML: {error.problem or error.context or 'it cannot be read'}"
    if mark is None:
        return Problem(str(path), "", what, error.context or "")
    hint = next((advice for words, advice in _SYNTAX_ADVICE.items() if words in what), "")
    line = mark.line + 1
    written = text.splitlines()
    if mark.line >= len(written):
        opening = error.context_mark.line + 1 if error.context_mark else line
        line = min(opening, len(written))
        hint = "close the bracket or the quotation mark that opens here"
    return Problem(f"{path}:{line}", "", f"{what}, in {_quoted_line(text, line)}", error.context or "", hint)


def describe_json_error(error: json.JSONDecodeError) -> str:
    """Return the error with its column and the line."""
    return f"{error.msg} at column {error.colno}, in {_quoted_line(error.doc, error.lineno)}"


def _quoted_line(text: str, line: int) -> str:
    """Return the text of a line in backticks, shortened where it is long."""
    lines = text.splitlines()
    written = ""
    if line <= len(lines):
        written = lines[line - 1].strip()
    shown = written
    if len(written) > _LONGEST_QUOTE:
        shown = f"{written[:_LONGEST_QUOTE]}…"
    return f"`{shown}`"
