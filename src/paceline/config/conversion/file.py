"""Converts configuration files: Accelerate's of every version, older ones of paceline, and DeepSpeed's JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from paceline.config.conversion.deepspeed import convert_deepspeed, is_deepspeed
from paceline.config.conversion.result import Conversion, ConvertedKey
from paceline.config.resolution import resolve
from paceline.config.schema.names import all_settings, sections, settings_by_key
from paceline.config.sources.document import Item, read_document
from paceline.config.sources.layers import GONE, file_layer
from paceline.config.translation import Translation, translate
from paceline.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from paceline.config.sources.layers import Layer

__all__ = ["convert_file"]

_TYPES: Final[Mapping[str, Mapping[str, object]]] = {
    "NO": {"strategy": "single"},
    "MULTI_CPU": {"strategy": "ddp", "use_cpu": True},
    "FSDP": {"strategy": "fsdp"},
    "DEEPSPEED": {"strategy": "deepspeed"},
}
"""Distributed types that `strategy` replaces; the others also name a kind of device, and stay."""

_LEGACY: Final = {"fp16": "mixed_precision", "dynamo_backend": "dynamo_config.dynamo_backend"}
"""Keys that only old files have at the top level."""


def convert_file(path: Path, *, compact: bool = True) -> Conversion:
    """Convert a file of Accelerate or DeepSpeed, or one that an older paceline wrote.

    Args:
        path: The file.
        compact: Leave out defaults and write `strategy` for distributed types; otherwise change only the keys
            that are written differently now.

    Returns:
        The new configuration, with what became of each key.
    """
    items, problems = read_document(path)
    if not problems and is_deepspeed(item.name for item in items):
        return convert_deepspeed(path)
    result = Conversion(str(path), problems=list(problems))
    layer = file_layer(path)
    found = [problem for problem in _problems(path) if problem not in problems]
    if layer.raws or not found:
        keys = _KeyConverter(result, layer, translate(layer.raws), found, compact)
        for section, item in _leaves(items):
            keys.convert(section, item)
    # Else no key can be used, for example in a file for SageMaker.
    result.problems.extend(problem for problem in found if problem not in result.problems)
    return result


def _problems(path: Path) -> Sequence[Problem]:
    try:
        resolve(flags={}, env={}, file=path)
    except ConfigError as error:
        return error.problems
    return ()


def _leaves(items: tuple[Item, ...]) -> Iterator[tuple[str, Item]]:
    """Yield every key with its section; a section without keys stands for itself."""
    for item in items:
        if item.name in sections() and item.items:
            yield from ((item.name, child) for child in item.items)
        else:
            yield "", item


@dataclass(frozen=True, slots=True)
class _KeyConverter:
    """Converts the keys of one file, one by one.

    Attributes:
        result: Takes the new values.
        layer: The file as it is read at a launch.
        translation: The same under the keys of FSDP2.
        problems: What is wrong with the file.
        compact: As in `convert_file`.
    """

    result: Conversion
    layer: Layer
    translation: Translation
    problems: Sequence[Problem]
    compact: bool

    def convert(self, section: str, item: Item) -> None:
        """Convert one key; `section` is empty at the top level."""
        written = f"{section}.{item.name}" if section else item.name
        shown = item.text if item.text is not None else item.value
        dotted = _dotted(section, item.name)
        problem = self._problem_at(item.where, (written, dotted, section))
        if problem is not None:
            self.result.refuse(item.where, written, shown, problem)
        elif item.name in GONE and not section:
            self.result.is_changed = True
            self.result.leave_out(item.where, written, shown, GONE[item.name])
        elif item.value is None or (dotted is None and not item.value):
            self.result.leave_out(item.where, written, "", "it is empty")
        elif dotted is None:
            self.result.leave_out(item.where, written, shown, "no part of the run reads it")
        else:
            is_legacy = not section and item.name in _LEGACY
            self._convert_value(item.where, written, shown, dotted, is_legacy)

    def _convert_value(self, where: str, written: str, shown: object, dotted: str, is_legacy: bool) -> None:
        if dotted in self.translation.became:
            self._take_translated(where, written, shown, dotted)
        elif is_legacy and dotted not in self.layer.raws:
            self.result.leave_out(where, written, shown, "that is the default of mixed_precision")
        else:
            self._take(where, written, dotted, shown if is_legacy else None)

    def _problem_at(self, where: str, keys: tuple[str | None, ...]) -> Problem | None:
        return next((problem for problem in self.problems if problem.where == where and problem.key in keys), None)

    def _value(self, dotted: str) -> object:
        raw = self.translation.raws[dotted]
        return all_settings()[dotted].shape.read(raw.value, raw.style, raw.text)

    def _take_translated(self, where: str, written: str, shown: object, dotted: str) -> None:
        """Write a key of FSDP version 1 under its new name, if it has one."""
        became = self.translation.became[dotted]
        self.result.is_changed = True
        if became.startswith("left out, "):
            self.result.leave_out(where, written, shown, became.removeprefix("left out, "))
            return
        self.result.keys.append(ConvertedKey(where, written, shown, became))
        name = f"fsdp_config.{became.split()[1]}"
        value = self._value(name)
        if value != all_settings()[name].default:
            self.result.values[name] = value

    def _take(self, where: str, written: str, dotted: str, shown: object = None) -> None:
        value = self._value(dotted)
        if self.compact and dotted == "distributed_type" and value in _TYPES:
            replacement = _TYPES[str(value)]
            self.result.put(where, written, value, "strategy", replacement["strategy"])
            self.result.values.update(replacement)
        elif self.compact and dotted == "use_cpu" and self.result.values.get("use_cpu"):
            self.result.leave_out(where, written, value, "distributed_type sets it")
        elif self.compact and (value == all_settings()[dotted].default or value in ("", [], ())):
            self.result.leave_out(where, written, value, "it is the default")
        else:
            self.result.put(where, written, value if shown is None else shown, dotted, value)


def _dotted(section: str, name: str) -> str | None:
    if not section and name in _LEGACY:
        return _LEGACY[name]
    setting = settings_by_key(section).get(name)
    if setting is None or (not section and name in sections()):
        return None
    return f"{section}.{setting.key}" if section else setting.key
