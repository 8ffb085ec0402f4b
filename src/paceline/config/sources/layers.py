"""Reads each source of the configuration into dotted keys and raw values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from paceline.config.schema.names import (
    PARADIGMS,
    PARALLELISM_SWITCH,
    flag_hint,
    flag_names,
    key_hint,
    sections,
    settings_by_key,
)
from paceline.config.schema.shapes import Shape
from paceline.config.sources.origin import Detected, Kind, Origin, Raw
from paceline.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from paceline.config.sources.document import Item


PREFIX: Final = "PACELINE_"
RESERVED: Final = frozenset({"PACELINE_CONFIG", "PACELINE_CONFIG_FILE", "PACELINE_HOME", "PACELINE_LOG_LEVEL"})
"""Variables that are not settings."""

_ACCELERATES: Final = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "MEGATRON_LM_")

GONE: Final = {"ipex_config": "torch itself has what that package added"}
"""Keys of old files that have no effect any more, with the reason."""

_BOOL: Final = Shape(frozenset({bool}), (), nullable=False)
_SAGEMAKER: Final = "amazon_sagemaker"


@dataclass(slots=True)
class Layer:
    """The values of one source.

    Attributes:
        raws: Dotted key to raw value.
        problems: Unknown names and values that cannot be read.
        notes: One line for each key that was read under another name.
        switch: The source of `--use_parallelism_config`, if it was given.
    """

    raws: dict[str, Raw] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    switch: Origin | None = None

    def put(self, key: str, raw: Raw) -> None:
        """Set a key; a second value under another of its names is a problem."""
        old = self.raws.setdefault(key, raw)
        if old is not raw:
            why = f"{old.origin.where} sets it too, to {old}"
            self.problems.append(Problem(raw.origin.where, key, f"{raw} is a second value", why, "keep one"))


def flag_layer(flags: Mapping[str, object]) -> Layer:
    """Read the flags that were given; None stands for a flag that was not."""
    given = ((name.lstrip("-").replace("-", "_"), value) for name, value in flags.items() if value is not None)
    return _named_layer(((name, f"--{name}", value) for name, value in given), "flag")


def environment_layer(env: Mapping[str, str]) -> Layer:
    """Read the PACELINE_ variables; an empty one is not set."""
    given = ((name, value) for name, value in sorted(env.items()) if name.startswith(PREFIX))
    return _named_layer(
        ((name.removeprefix(PREFIX).lower(), name, value) for name, value in given if value and name not in RESERVED),
        "environment",
    )


def unread_variables(env: Mapping[str, str]) -> Iterator[str]:
    """Yield a note for each variable of Accelerate that has a counterpart here; none of them is read."""
    if "PACELINE_CONFIG" in env:  # the launcher set them
        return
    for name in sorted(env):
        if name.startswith(_ACCELERATES):
            word = name.removeprefix("ACCELERATE_").lower()
            known = [n for n in (word, word.removeprefix("deepspeed_")) if n in flag_names() or n in PARADIGMS]
            if known and env[name]:
                yield f"{name}: Accelerate's variable is not read; write {PREFIX}{known[0].upper()}"


def detected_layer(detected: Mapping[str, object]) -> Layer:
    """Read the values detected on the machine, by dotted key; a `Detected` names its source."""
    layer = Layer()
    for key, value in detected.items():
        result = value if isinstance(value, Detected) else Detected(value, "detected on this machine")
        if result.value is not None:
            layer.raws[key] = Raw(result.value, Origin("detected", result.where))
    return layer


def file_layer(path: Path) -> Layer:
    """Read a configuration file."""
    # A rank has its configuration from the launcher: it reads no YAML.
    from paceline.config.sources.document import read_document

    layer = Layer()
    items, problems = read_document(path)
    layer.problems.extend(problems)
    for item in items:
        if item.name == "compute_environment" and str(item.text).casefold() == _SAGEMAKER:
            return Layer(problems=[*problems, _sagemaker_problem(item)])
    for item in items:
        _read_top(layer, item)
    return layer


def merge(layers: Iterable[Layer]) -> dict[str, Raw]:
    """Take each key from the first layer that has it."""
    merged: dict[str, Raw] = {}
    for layer in layers:
        for key, raw in layer.raws.items():
            merged.setdefault(key, raw)
    return merged


def _named_layer(given: Iterable[tuple[str, str, object]], kind: Kind) -> Layer:
    layer = Layer()
    paradigms: list[tuple[str, Origin]] = []
    for name, where, value in given:
        origin = Origin(kind, where)
        if name in PARADIGMS or name == PARALLELISM_SWITCH:
            answer = _BOOL.read(value, "text")
            if not isinstance(answer, bool):
                what = f"{value!r} is not allowed"
                layer.problems.append(Problem(where, name, what, "it must be true or false"))
            elif answer and name == PARALLELISM_SWITCH:
                layer.switch = origin
            elif answer:
                paradigms.append((name, origin))
        elif name in flag_names():
            layer.put(flag_names()[name], Raw(value, origin, "text" if isinstance(value, str) else "native"))
        else:
            layer.problems.append(_unknown_name(name, where, kind))
    _put_paradigm(layer, paradigms)
    return layer


def _unknown_name(name: str, where: str, kind: Kind) -> Problem:
    hint = flag_hint(name)
    if kind == "flag":
        return Problem(where, "", "unknown flag", hint=hint)
    if hint:
        hint = _as_variable(hint)
    return Problem(where, "", "unknown variable", hint=hint)


def _as_variable(hint: str) -> str:
    head, _, name = hint.rstrip("?").rpartition(" ")
    return f"{head} {PREFIX}{name.upper()}?"


def _put_paradigm(layer: Layer, paradigms: list[tuple[str, Origin]]) -> None:
    for name, origin in paradigms[:1]:
        layer.put("distributed_type", Raw(PARADIGMS[name], origin))
    for _, origin in paradigms[1:]:
        what = f"conflicts with {paradigms[0][1].where}"
        why = "each of them chooses the strategy"
        layer.problems.append(Problem(origin.where, "", what, why, "keep one"))


def _sagemaker_problem(item: Item) -> Problem:
    return Problem(
        item.where,
        item.name,
        f"{item.text} is not supported in this release",
        "paceline only starts processes on the machines it runs on",
        "write compute_environment: LOCAL_MACHINE, and start the script from your own SageMaker job",
    )


def _read_top(layer: Layer, item: Item) -> None:
    if item.name in sections():
        _read_section(layer, item)
        return
    if item.name in ("fp16", "dynamo_backend"):
        _read_legacy(layer, item)
        return
    if item.name in GONE:
        layer.notes.append(f"{item.where}: {item.name} (old): left out, {GONE[item.name]}")
        return
    setting = settings_by_key("").get(item.name)
    if setting is None:
        hint = key_hint(item.name, "")
        layer.problems.append(Problem(item.where, item.name, "unknown key", hint=hint))
    elif item.value is not None:
        layer.put(setting.key, _raw(item))


def _read_section(layer: Layer, item: Item) -> None:
    if item.value is None or item.value == "" or item.value == []:
        return
    if item.items is None:
        what = f"{item.value!r} is not allowed"
        hint = f"indent the section's keys under {item.name}:"
        layer.problems.append(Problem(item.where, item.name, what, "a section holds keys and values", hint))
        return
    names = settings_by_key(item.name)
    for child in item.items:
        setting = names.get(child.name)
        if setting is None:
            hint = key_hint(child.name, item.name)
            layer.problems.append(Problem(child.where, f"{item.name}.{child.name}", "unknown key", hint=hint))
        elif child.value is not None:
            layer.put(f"{item.name}.{setting.key}", _raw(child))


def _read_legacy(layer: Layer, item: Item) -> None:
    if item.value is None:
        return
    raw = _raw(item)
    if item.name == "dynamo_backend":
        layer.put("dynamo_config.dynamo_backend", raw)
        layer.notes.append(f"{item.where}: dynamo_backend (old): became dynamo_config.dynamo_backend {raw}")
        return
    answer = _BOOL.read(item.value, raw.style)
    if not isinstance(answer, bool):
        what = f"{raw} is not allowed"
        layer.problems.append(Problem(item.where, "fp16", what, "it must be true or false"))
    elif answer:
        layer.put("mixed_precision", Raw("fp16", raw.origin, text="fp16"))
        layer.notes.append(f"{item.where}: fp16 true (old): became mixed_precision fp16")


def _raw(item: Item) -> Raw:
    return Raw(item.value, Origin("file", item.where), item.style, item.text)
