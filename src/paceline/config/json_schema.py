"""The JSON Schema of the configuration file, from which editors complete and check."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from paceline.config.schema.base import settings_of
from paceline.config.schema.names import sections
from paceline.config.schema.run import RunConfig
from paceline.config.sources.layers import GONE

if TYPE_CHECKING:
    from paceline.config.schema.base import Section, Setting

__all__ = ["json_schema"]

_DIALECT: Final = "http://json-schema.org/draft-07/schema#"
_QUOTED: Final = {"type": "string", "pattern": "^([Tt]rue|[Ff]alse|[Yy]es|[Nn]o|[Oo]n|[Oo]ff)$"}
_LEGACY: Final = {"fp16": "mixed_precision: fp16", "dynamo_backend": "dynamo_config: {dynamo_backend: …}"}
"""Keys of very old files, with their replacement."""


def json_schema() -> dict[str, Any]:
    """Return the schema, old spellings marked as deprecated; draft 7, which editors support."""
    properties: dict[str, Any] = {}
    for setting, schema in _fields(RunConfig):
        if setting.field in sections():
            properties[setting.key] = _section(setting)
        else:
            properties.update(_spellings(setting, schema))
    for name, now in _LEGACY.items():
        properties[name] = {"description": f"Old; write {now}.", "deprecated": True}
    for name, why in GONE.items():
        properties[name] = {"description": f"Old; remove it: {why}.", "deprecated": True}
    return {
        "$schema": _DIALECT,
        "title": "paceline configuration",
        "description": (RunConfig.__doc__ or "").partition("\n")[0],
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def _section(setting: Setting) -> dict[str, Any]:
    current, *old = sections()[setting.field]
    properties: dict[str, Any] = {}
    for inner, schema in _fields(current):
        properties.update(_spellings(inner, schema, current.key_prefix))
    for model in old:
        for inner in settings_of(model):
            described = {"description": inner.description, "deprecated": True}
            names = (inner.key, *inner.aliases)
            properties.update(dict.fromkeys((*names, *(n.removeprefix(model.key_prefix) for n in names)), described))
    return {
        "description": setting.description,
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": properties,
    }


def _fields(model: type[Section]) -> list[tuple[Setting, dict[str, Any]]]:
    described = model.model_json_schema()["properties"]
    return [(setting, described[setting.field]) for setting in settings_of(model)]


def _spellings(setting: Setting, schema: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Describe a key and its other spellings."""
    if "properties" in schema or "$ref" in schema:
        return {setting.key: schema}
    described = _described(setting, schema)
    others = dict.fromkeys((*setting.aliases, *(n.removeprefix(prefix) for n in (setting.key, *setting.aliases))))
    old = {**described, "description": f"Other spelling of {setting.key}. {setting.description}", "deprecated": True}
    return {setting.key: described, **{name: old for name in others if name != setting.key}}


def _described(setting: Setting, schema: dict[str, Any]) -> dict[str, Any]:
    """Describe what a file may hold: more than the Python field, since text is converted."""
    parts = [part for part in schema.get("anyOf", [_only_type(schema)]) if part != {"type": "null"}]
    if setting.more_choices:
        parts.append({"enum": [int(choice) for choice in setting.more_choices]})
    if setting.shape.types & {tuple, list}:
        parts.append({"type": "string"})
    if bool in setting.shape.types:
        parts.append(_QUOTED)
    words = [choice for choice in setting.shape.choices if isinstance(choice, str)]
    if words:
        parts.append({"type": "string", "pattern": f"^({'|'.join(map(_in_any_case, words))})$"})
    described: dict[str, Any] = {"description": setting.description, "default": schema.get("default")}
    if setting.labels:
        described["description"] += " " + "; ".join(f"{name}: {text}" for name, text in setting.labels) + "."
    parts.append({"type": "null"})
    return {**described, "anyOf": parts}


def _in_any_case(word: str) -> str:
    """Write a pattern that ignores case: JSON Schema has no flag for that."""
    return "".join(f"[{c.upper()}{c.lower()}]" if c.isalpha() else re.escape(c) for c in word)


def _only_type(schema: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in schema.items() if name not in ("description", "default", "title")}
