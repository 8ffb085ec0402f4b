"""Configuration files: Accelerate's of every version, our own older ones, and DeepSpeed's JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from paceline.config.conversion.deepspeed import convert_deepspeed, is_deepspeed
from paceline.config.conversion.result import Conversion
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
"""What distributed types mean in our own words; the others also say which devices there must be, and stay."""

_OLD: Final = {"fp16": "mixed_precision", "dynamo_backend": "dynamo_config.dynamo_backend"}
"""Keys that only old files have at the top level."""


def convert_file(path: Path, *, compact: bool = True) -> Conversion:
    """Convert a file of Accelerate or DeepSpeed, or one that an older paceline wrote.

    Args:
        path: The file.
        compact: Leave out what is at its default, and say strategies in our own words; otherwise only what
            is written differently now changes.
    """
    items, problems = read_document(path)
    if not problems and is_deepspeed(item.name for item in items):
        return convert_deepspeed(path)
    result = Conversion(str(path), problems=list(problems))
    layer = file_layer(path)
    found = [problem for problem in _problems(path) if problem not in problems]
    if not layer.raws and found:
        # Nothing of such a file can be used, for example of one for SageMaker.
        result.problems.extend(found)
        return result
    translation = translate(layer.raws)
    for item in _leaves(items):
        _convert(result, item, layer, translation, found, compact)
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


def _convert(
    result: Conversion,
    leaf: tuple[str, Item],
    layer: Layer,
    translation: Translation,
    found: Sequence[Problem],
    compact: bool,
) -> None:
    section, item = leaf
    prefix = f"{section}." if section else ""
    written, where = prefix + item.name, item.where
    shown = item.text if item.text is not None else item.value
    dotted = _dotted(section, item.name)
    problem = next((p for p in found if p.where == where and p.key in (written, dotted, section)), None)
    if problem is not None:
        result.refuse(where, written, shown, problem)
    elif not section and item.name in GONE:
        result.is_changed = True
        result.leave_out(where, written, shown, GONE[item.name])
    elif item.value is None or (dotted is None and not item.value):
        result.leave_out(where, written, "", "it is empty")
    elif dotted is None:
        result.leave_out(where, written, shown, "nothing reads it")
    elif dotted in translation.became:
        _take_translation(result, where, written, shown, dotted, translation)
    elif item.name in _OLD and not section:
        raw = layer.raws.get(dotted)
        if raw is None:
            result.leave_out(where, written, shown, "that is the default of mixed_precision")
        else:
            _take(result, where, written, dotted, translation, compact, shown)
    else:
        _take(result, where, written, dotted, translation, compact)


def _dotted(section: str, name: str) -> str | None:
    if not section and name in _OLD:
        return _OLD[name]
    setting = settings_by_key(section).get(name)
    if setting is None or (not section and name in sections()):
        return None
    return f"{section}.{setting.key}" if section else setting.key


def _take_translation(
    result: Conversion, where: str, written: str, shown: object, dotted: str, translation: Translation
) -> None:
    """Take over a key of FSDP version 1 under its new name, if it has one."""
    became = translation.became[dotted]
    result.is_changed = True
    result.leave_out(where, written, shown, became.removeprefix("left out, "))
    if not became.startswith("left out"):
        fate = result.fates.pop()
        result.fates.append(type(fate)(where, written, shown, became))
        name = f"fsdp_config.{became.split()[1]}"
        raw = translation.raws[name]
        value = all_settings()[name].shape.read(raw.value, raw.style, raw.text)
        if value != all_settings()[name].default:
            result.values[name] = value


def _take(
    result: Conversion,
    where: str,
    written: str,
    dotted: str,
    translation: Translation,
    compact: bool,
    shown: object = None,
) -> None:
    raw, setting = translation.raws[dotted], all_settings()[dotted]
    value = setting.shape.read(raw.value, raw.style, raw.text)
    if compact and dotted == "distributed_type" and value in _TYPES:
        meant = _TYPES[str(value)]
        result.put(where, written, value, "strategy", meant["strategy"])
        result.values.update(meant)
    elif compact and dotted == "use_cpu" and result.values.get("use_cpu"):
        result.leave_out(where, written, value, "distributed_type said it")
    elif compact and (value == setting.default or value in ("", [], ())):
        result.leave_out(where, written, value, "it is the default")
    else:
        result.put(where, written, value if shown is None else shown, dotted, value)
